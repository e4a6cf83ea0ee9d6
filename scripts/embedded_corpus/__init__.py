"""The text the embedded model learns from: generated here, seeded, free for any use."""

from embedded_corpus.chats import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START
from embedded_corpus.documents import documents

__all__ = ["CHAT_TEMPLATE", "END_OF_TEXT", "IM_END", "IM_START", "documents"]
