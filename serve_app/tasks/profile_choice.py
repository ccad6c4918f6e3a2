"""Choice of the profile by which a model answers typed questions."""

from __future__ import annotations

from typing import NamedTuple

from serve_app.profiles.profile import CHAT, PLAIN, PROFILES, Profile
from serve_app.settings import ModelSettings
from serve_app.tasks.chat import ChatTemplate


class ProfileChoice(NamedTuple):
    """The profile of the decision routes.

    Attributes:
        because: why it was chosen.
        problem: why the model cannot answer questions with it; None if it can.
    """

    profile: Profile
    because: str
    problem: str | None

    def __str__(self) -> str:
        return f"decisions use the profile {self.profile.name} ({self.because})"


def choose_profile(settings: ModelSettings, chat: ChatTemplate | None) -> ProfileChoice:
    """Choose the profile that the settings name, else the one for chat models if the model has a chat template.

    Raises:
        ValueError: the settings name a profile for chat models, and the model has no chat template.
    """
    if settings.decision_profile is not None:
        profile, because = PROFILES[settings.decision_profile], "named in the settings"
        if profile.chat and chat is None:
            raise ValueError(
                f"decision_profile: {profile.name} is for chat models, and this one has no chat template; use {PLAIN}"
            )
    elif chat is not None:
        profile, because = PROFILES[CHAT], "the model has a chat template"
    else:
        profile, because = PROFILES[PLAIN], "the model has no chat template"
    return ProfileChoice(profile, because, chat.problem if profile.chat and chat else None)
