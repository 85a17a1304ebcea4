"""Teachers: their interfaces, and an implementation in each file."""

from lit_distill.teachers.base import LoadedTeacher, Opening, Teacher, TeacherRows, walk
from lit_distill.teachers.loading import load_student_and_teacher
from lit_distill.teachers.local import FrozenTeacher, HiddenRows, LocalTeacher, as_teacher

__all__ = [
    "FrozenTeacher",
    "HiddenRows",
    "LoadedTeacher",
    "LocalTeacher",
    "Opening",
    "Teacher",
    "TeacherRows",
    "as_teacher",
    "load_student_and_teacher",
    "walk",
]
