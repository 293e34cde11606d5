"""Every loss once more, as loops over images, classes, groups and pixels, straight from the maths."""

import math

import torch


def kd(student, teacher, labels, temperature=1.0, ignore=255):
    total, count = 0.0, 0
    batch, _, height, width = student.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if labels[b, y, x] == ignore:
                    continue
                p = torch.softmax(teacher[b, :, y, x].double() / temperature, 0)
                q = torch.softmax(student[b, :, y, x].double() / temperature, 0)
                total += (p * (p.log() - q.log())).sum().item()
                count += 1
    return temperature**2 * total / max(count, 1)


def mse(student, teacher, labels, normalise=False, ignore=255):
    values = []
    batch, _, height, width = student.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if labels[b, y, x] == ignore:
                    continue
                s, t = student[b, :, y, x].double(), teacher[b, :, y, x].double()
                if normalise:
                    s, t = s / s.norm().clamp(min=1e-30), t / t.norm().clamp(min=1e-30)
                values.append(((s - t) ** 2).mean().item())
    return sum(values) / max(len(values), 1)


def _cosine(u, v):
    length = u.norm() * v.norm()
    return (u @ v / length).item() if length > 0 else 0.0


def gskd(student, teacher, valid, order, group_sizes, temperature=1.0):
    """Points (B, M, C), order (B, M, M) with valid columns first, one group size per image."""
    losses = []
    for b in range(student.shape[0]):
        real = [i for i in range(valid.shape[1]) if valid[b, i]]
        if not real:
            continue
        columns = {i: [j for j in order[b, i].tolist() if valid[b, j]] for i in real}
        size, loss = int(group_sizes[b]), 0.0
        for start in range(0, len(real), size):
            pairs = [(i, j) for i in real for j in columns[i][start : start + size]]
            t = torch.tensor([_cosine(teacher[b, i].double(), teacher[b, j].double()) for i, j in pairs])
            s = torch.tensor([_cosine(student[b, i].double(), student[b, j].double()) for i, j in pairs])
            p, q = torch.softmax(t.double() / temperature, 0), torch.softmax(s.double() / temperature, 0)
            share = len(pairs) / len(real) ** 2
            loss += share * (p * (p.log() - q.log())).sum().item()
        losses.append(temperature**2 * loss)
    return math.fsum(losses) / max(len(losses), 1)


def bilinear(features, y, x, size):
    """One pixel (y, x) of a map resized to ``size``: (C,)."""
    height, width = features.shape[-2:]
    v = min(max((y + 0.5) * height / size[0] - 0.5, 0.0), height - 1.0)
    u = min(max((x + 0.5) * width / size[1] - 0.5, 0.0), width - 1.0)
    v0, u0 = int(v), int(u)
    v1, u1 = min(v0 + 1, height - 1), min(u0 + 1, width - 1)
    top = features[:, v0, u0] * (1 - u + u0) + features[:, v0, u1] * (u - u0)
    bottom = features[:, v1, u0] * (1 - u + u0) + features[:, v1, u1] * (u - u0)
    return top * (1 - v + v0) + bottom * (v - v0)
