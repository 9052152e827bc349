"""Hydra launcher `process`: every job of a multirun is a fresh process. The class is in process_launcher.py."""
