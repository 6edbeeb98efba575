"""The embedded demo world: pictures with known attributes, captions, edits, verifiers."""
