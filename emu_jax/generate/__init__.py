"""Generation: text, the embeddings of pictures, pictures, and sequences of both."""
