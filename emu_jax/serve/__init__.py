"""The local web page: chat with pictures and video, and drawing from mixed prompts."""
