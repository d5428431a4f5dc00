"""Where images come from, one module a kind: folders, tables, archives, rendered scenes."""
