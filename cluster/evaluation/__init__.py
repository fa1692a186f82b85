"""``fgaif eval``: what is asked, who answers, who judges, what comes out."""
