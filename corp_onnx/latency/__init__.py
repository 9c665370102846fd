"""How long engines take, turn by turn, and how much memory; the conditions are on record."""
