"""The version. This module imports nothing, so that the build can read it without torch."""

VERSION = "0.1.0"
