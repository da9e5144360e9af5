"""The pure state machine: events in, commands out. Imports the standard library, `spec` and `errors` only."""
