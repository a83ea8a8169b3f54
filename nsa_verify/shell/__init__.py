"""The shell: command line, pytest plugin and reporters. It listens to the engine's events."""
