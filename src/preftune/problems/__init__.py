"""Problems to study methods on: prompts, reward, offline data, reference policy."""
