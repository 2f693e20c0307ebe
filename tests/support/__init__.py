"""What several test modules share, and what they run in processes of their own."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
