"""The demo's world: scenes, captions, edits and their exact renders."""
