"""Tables and figures from the records. Imports no torch."""
