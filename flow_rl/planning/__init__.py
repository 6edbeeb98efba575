"""`train.py doctor`: checks a whole configuration and says what it will take, before anything is loaded."""
