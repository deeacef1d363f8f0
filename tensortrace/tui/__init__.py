"""The viewer: a Textual program over a `Run`, the only part that imports textual."""
