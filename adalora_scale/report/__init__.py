"""What a run's records say, for people: one HTML file, pictures, the terminal. Reads files only; knows no torch."""
