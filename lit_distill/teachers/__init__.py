"""Teachers: their interfaces, and an implementation in each file."""

from lit_distill.teachers.aligned import AlignedTeacher
from lit_distill.teachers.base import LoadedTeacher, Opening, Teacher, TeacherRows, cached_parts, walk
from lit_distill.teachers.cached import CachedTeacher
from lit_distill.teachers.combined import MixedTeachers, RoutedTeachers
from lit_distill.teachers.following import StudentTeacher
from lit_distill.teachers.loading import load_models
from lit_distill.teachers.local import FrozenTeacher, HiddenRows, LocalTeacher, as_teacher
from lit_distill.teachers.prompted import PromptedTeacher
from lit_distill.teachers.remote import ServerTeacher

__all__ = [
    "AlignedTeacher",
    "CachedTeacher",
    "FrozenTeacher",
    "HiddenRows",
    "LoadedTeacher",
    "LocalTeacher",
    "MixedTeachers",
    "Opening",
    "PromptedTeacher",
    "RoutedTeachers",
    "ServerTeacher",
    "StudentTeacher",
    "Teacher",
    "TeacherRows",
    "as_teacher",
    "cached_parts",
    "load_models",
    "walk",
]
