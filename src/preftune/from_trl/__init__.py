"""Configurations of TRL's trainers into preftune's, and back.

`fields.yaml` says of each of TRL's settings what becomes of it.
"""

from preftune.from_trl.converting import Converted, convert
from preftune.from_trl.exporting import Exported, export
from preftune.from_trl.reading import Given, read
from preftune.from_trl.table import Field, Table, table

__all__ = ["Converted", "Exported", "Field", "Given", "Table", "convert", "export", "read", "table"]
