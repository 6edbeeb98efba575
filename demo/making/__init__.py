"""How the demo's shipped weights and files were made."""
