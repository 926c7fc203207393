"""What can be said exactly: closed forms that estimators and training are checked against."""
