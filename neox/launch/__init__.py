"""How processes come to be: launchers, local workers, command lines, exit statuses. Imports no torch."""
