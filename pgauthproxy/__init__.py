"""A PostgreSQL gateway whose operator decides, by a script of their own, who logs in and as whom."""
