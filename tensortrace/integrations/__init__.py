"""Adapters to training frameworks, one file per framework."""
