"""Teachers: their interface, and its implementation with a local model."""

from lit_distill.teachers.base import Teacher, TeacherRows
from lit_distill.teachers.local import FrozenTeacher, HiddenRows

__all__ = ["FrozenTeacher", "HiddenRows", "Teacher", "TeacherRows"]
