"""An expert cache's bookkeeping: who is resident, in which order they leave, how much room."""
