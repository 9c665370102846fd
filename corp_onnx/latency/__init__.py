"""How long engines take: timed turn by turn, under conditions that are on record."""
