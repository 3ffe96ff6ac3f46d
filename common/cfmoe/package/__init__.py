"""From an artifact to an app that a phone installs."""
