"""lite_mentor: reinforcement learning for tool-using small language models, guided by a cached teacher."""

__version__ = "0.1.0"
