"""Solids on a pixel grid: the nearest surface point of every pixel and its unit normal, in closed form.

Camera space is x right, y up, z towards the viewer. The picture spans [-1, 1] x [-1, 1] and its rays are parallel
to z, so the visible side of a solid is a height field over the picture. ``hit(x, y)`` returns the depth z, float64
(h, w) with -inf where the ray misses, and the unit normal, float64 and broadcastable to (3, h, w).
"""

from dataclasses import dataclass
from functools import reduce
from math import copysign, cos, hypot, inf, sin
from typing import Protocol

import numpy as np

Bounds = tuple[float, float, float, float]  # left, bottom, right, top
Hit = tuple[np.ndarray, np.ndarray]
Interval = tuple[np.ndarray, np.ndarray, np.ndarray]  # of z: back end, front end, normal at the front end


class Shape(Protocol):
    def bounds(self) -> Bounds:
        """A rectangle of the picture that holds the shape."""

    def hit(self, x: np.ndarray, y: np.ndarray) -> Hit:
        """Depth and normal at columns x (1, w) and rows y (h, 1)."""


def upright_frame(pitch: float, yaw: float) -> np.ndarray:
    """(3, 3): rows are the right, up and front axes, in camera space, of an object turned by ``yaw`` about the vertical
    and seen by a camera that looks down by ``pitch`` (radians)."""
    right = (cos(yaw), sin(yaw) * sin(pitch), -sin(yaw) * cos(pitch))
    up = (0.0, cos(pitch), sin(pitch))
    front = (sin(yaw), -cos(yaw) * sin(pitch), cos(yaw) * cos(pitch))
    return np.array([right, up, front])


class ZBuffer:
    """A size x size picture of the nearest surfaces.

    depth: float64 (size, size); normal: float64 (3, size, size); owner: int64 (size, size), the number under which
    the surface was painted. x (1, size) and y (size, 1) are the pixel centres.
    """

    def __init__(self, size: int) -> None:
        centres = (2 * np.arange(size) + 1) / size - 1
        self.x, self.y = centres[None, :], -centres[:, None]
        self.depth = np.full((size, size), -inf)
        self.normal = np.zeros((3, size, size))
        self.owner = np.zeros((size, size), np.int64)

    def _window(self, shape: Shape) -> tuple[slice, slice]:
        size = len(self.owner)
        left, bottom, right, top = (min(max(bound, -1), 1) for bound in shape.bounds())
        rows = slice(int((1 - top) / 2 * size), int((1 - bottom) / 2 * size) + 1)
        return rows, slice(int((left + 1) / 2 * size), int((right + 1) / 2 * size) + 1)

    def paint(self, shape: Shape, owner: int) -> None:
        """Keeps, at each pixel, the nearer of the shape and the surface painted before."""
        rows, cols = self._window(shape)
        depth, normal = shape.hit(self.x[:, cols], self.y[rows])
        nearer = depth > self.depth[rows, cols]
        np.copyto(self.depth[rows, cols], depth, where=nearer)
        np.copyto(self.normal[:, rows, cols], normal, where=nearer)
        np.copyto(self.owner[rows, cols], owner, where=nearer)


@dataclass(frozen=True)
class Plane:
    """The plane through ``point`` with unit normal ``normal``, which faces the viewer."""

    point: np.ndarray
    normal: np.ndarray

    def bounds(self) -> Bounds:
        return -inf, -inf, inf, inf

    def hit(self, x: np.ndarray, y: np.ndarray) -> Hit:
        nx, ny, nz = self.normal.tolist()
        return (self.normal @ self.point - nx * x - ny * y) / nz, self.normal[:, None, None]


def triangular_axes(axes: np.ndarray) -> np.ndarray:
    """The lower-triangular matrix L for which {L @ q : |q| <= 1} is the ellipsoid {axes @ q : |q| <= 1}."""
    return np.linalg.cholesky(axes @ axes.T)


@dataclass(frozen=True)
class Pill:
    """An ellipsoid swept along the segment start - end: a capsule, or an ellipsoid where the two are one point.

    ``axes`` is lower triangular (r * identity for a ball). In p = start + axes @ q the third coordinate of q
    then changes z alone. So in q the rays still run along the third axis, and the solid is a capsule of radius 1.
    """

    start: np.ndarray
    end: np.ndarray
    axes: np.ndarray

    def bounds(self) -> Bounds:
        (a, _, _), (b, c, _), _ = self.axes.tolist()
        (x0, y0, _), (x1, y1, _) = self.start.tolist(), self.end.tolist()
        width, height = a, hypot(b, c)
        return min(x0, x1) - width, min(y0, y1) - height, max(x0, x1) + width, max(y0, y1) + height

    def hit(self, x: np.ndarray, y: np.ndarray) -> Hit:
        (a, _, _), (b, c, _), (d, e, f) = self.axes.tolist()
        x0, y0, z0 = self.start.tolist()
        dx, dy, dz = (self.end - self.start).tolist()

        # In q: the rays (u, v), and the segment (du, dv, rise) from the origin.
        u = (x - x0) / a
        v = (y - y0 - b * u) / c
        du = dx / a
        dv = (dy - b * du) / c
        rise = (dz - d * du - e * dv) / f

        # The ball at t in [0, 1] along the segment is the one that is highest over (u, v); height is concave in t.
        length = hypot(du, dv) or 1e-12
        s = (u * du + v * dv) / length
        across2 = 1 - (u * u + v * v - s * s)
        slope = rise / hypot(length, rise)
        t = ((s + slope * np.sqrt(np.maximum(across2, 0))) / length).clip(0, 1)
        height2 = across2 - (s - t * length) ** 2
        height = np.sqrt(np.maximum(height2, 0))

        depth = z0 + d * u + e * v + f * (t * rise + height)
        depth[height2 < 0] = -inf
        # The gradient of |q|^2 in p is the transposed inverse of axes times q: a back substitution.
        nz = height / f
        ny = (v - t * dv - e * nz) / c
        nx = (u - t * du - b * ny - d * nz) / a
        return depth, np.stack([nx, ny, nz]) / np.sqrt(nx * nx + ny * ny + nz * nz)


@dataclass(frozen=True)
class Upright:
    """A solid that fills a box: centre (3,), half extents (3,) along its own axes, the rows of ``frame``.

    It is an intersection of convex constraints. Each confines z to an interval, and the front of the intersection is
    the least of the front ends, with the normal of the constraint that ends there.
    """

    centre: np.ndarray
    half: np.ndarray
    frame: np.ndarray

    def bounds(self) -> Bounds:
        x, y, _ = self.centre.tolist()
        width, height, _ = (self.half @ abs(self.frame)).tolist()
        return x - width, y - height, x + width, y + height

    def hit(self, x: np.ndarray, y: np.ndarray) -> Hit:
        x, y = x - self.centre[0], y - self.centre[1]
        origin = [fx * x + fy * y for fx, fy, _ in self.frame.tolist()]
        backs, fronts, normals = zip(*self._intervals(origin), strict=True)
        front = reduce(np.minimum, fronts)
        normal = normals[0]
        for other_front, other in zip(fronts[1:], normals[1:], strict=True):
            normal = np.where(other_front == front, other, normal)
        return np.where(front >= reduce(np.maximum, backs), self.centre[2] + front, -inf), normal

    def _intervals(self, origin: list[np.ndarray]) -> list[Interval]:
        """One per constraint, for the rays origin + z * frame[:, 2] in the solid's coordinates about its centre."""
        raise NotImplementedError

    def _slab(self, origin: list[np.ndarray], axis: int) -> Interval:
        """|p[axis]| <= half[axis]."""
        slope = float(self.frame[axis, 2]) or 1e-12
        front = copysign(self.half[axis], slope)
        normal = copysign(1, slope) * self.frame[axis, :, None, None]
        return (-front - origin[axis]) / slope, (front - origin[axis]) / slope, normal

    def _quadric(self, origin: list[np.ndarray], weights: tuple[float, ...], level: float) -> Interval:
        """sum(weights * p**2) <= level, where that is one interval of the ray."""
        slope = self.frame[:, 2].tolist()
        a = sum(w * d * d for w, d in zip(weights, slope, strict=True))
        b = sum(w * d * o for w, d, o in zip(weights, slope, origin, strict=True))
        c = sum(w * o * o for w, o in zip(weights, origin, strict=True)) - level
        inside = b * b - a * c
        root = np.sqrt(np.where(inside < 0, np.nan, inside))
        front = (root - b) / a
        gradient = [w * (o + front * d) for w, o, d in zip(weights, origin, slope, strict=True)]
        normal = np.tensordot(self.frame.T, np.stack(gradient), 1)
        return (-root - b) / a, front, normal / np.sqrt((normal**2).sum(0))


class Box(Upright):
    def _intervals(self, origin: list[np.ndarray]) -> list[Interval]:
        return [self._slab(origin, axis) for axis in range(3)]


class Cylinder(Upright):
    """Vertical; half = (radius, half the height, radius)."""

    def _intervals(self, origin: list[np.ndarray]) -> list[Interval]:
        return [self._quadric(origin, (1, 0, 1), self.half[0] ** 2), self._slab(origin, 1)]


class Cone(Upright):
    """Apex up; half = (radius, half the height, radius). The camera looks down less steeply than the cone's side."""

    def _intervals(self, origin: list[np.ndarray]) -> list[Interval]:
        radius, half_height, _ = self.half.tolist()
        about_apex = [origin[0], origin[1] - half_height, origin[2]]
        side = self._quadric(about_apex, (1, -((radius / (2 * half_height)) ** 2), 1), 0)
        return [side, self._slab(origin, 1)]
