"""Where rows come from: local files, reasoning-gym."""
