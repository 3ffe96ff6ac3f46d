"""The command `cfmoe`: one thin module per command, which parses and calls the library; heavy imports inside the commands."""
