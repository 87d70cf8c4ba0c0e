"""The pocket world: tasks that can be checked exactly, a tiny policy that gets some of them right, and its teacher."""
