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


def kd_top(student, teacher, labels, top, temperature=1.0, ignore=255):
    """The classes by name, then everything else as one."""
    total, count = 0.0, 0
    batch, classes, height, width = student.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if labels[b, y, x] == ignore:
                    continue
                p = torch.softmax(teacher[b, :, y, x].double() / temperature, 0).tolist()
                q = torch.softmax(student[b, :, y, x].double() / temperature, 0).tolist()
                named = sorted(range(classes), key=lambda k: -p[k])[:top]
                rest = [k for k in range(classes) if k not in named]
                events = [[k] for k in named] + ([rest] if rest else [])
                for event in events:
                    mine, theirs = math.fsum(p[k] for k in event), math.fsum(q[k] for k in event)
                    total += mine * math.log(mine / theirs)
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


def _pixels(valid):
    """The valid places of one image (h, w), in reading order."""
    return [(y, x) for y in range(valid.shape[0]) for x in range(valid.shape[1]) if valid[y, x]]


def _mean(values):
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def _kl(t, s):
    p, q = torch.softmax(t.double(), 0), torch.softmax(s.double(), 0)
    return (p * (p.log() - q.log())).sum().item()


def kd_standardised(student, teacher, labels, temperature):
    def z(maps):
        out = maps.double().clone()
        for b in range(maps.shape[0]):
            for y in range(maps.shape[2]):
                for x in range(maps.shape[3]):
                    column = out[b, :, y, x]
                    out[b, :, y, x] = (column - column.mean()) / column.std(correction=0)
        return out

    return kd(z(student), z(teacher), labels, temperature)


def attention(features, valid):
    """One image (C, h, w): unit vector over its valid places."""
    values = torch.tensor([(features[:, y, x].double() ** 2).mean() for y, x in _pixels(valid)])
    return values / values.norm()


def at(student, teacher, valid):
    return _mean(
        ((attention(student[b], valid[b]) - attention(teacher[b], valid[b])) ** 2).sum().item()
        for b in range(len(valid))
        if valid[b].any()
    )


def cwd(student, teacher, valid, temperature):
    losses = []
    for b in range(len(valid)):
        for c in range(student.shape[1]) if valid[b].any() else ():
            s, t = (
                torch.stack([m[b, c, y, x] for y, x in _pixels(valid[b])]) / temperature for m in (student, teacher)
            )
            losses.append(temperature**2 * _kl(t, s))
    return _mean(losses)


def pairwise(student, teacher, valid):
    """Vectors (B, C, P), valid (B, P)."""
    losses = []
    for b in range(len(valid)):
        places = [i for i in range(valid.shape[1]) if valid[b, i]]
        differences = [
            _cosine(student[b, :, i].double(), student[b, :, j].double())
            - _cosine(teacher[b, :, i].double(), teacher[b, :, j].double())
            for i in places
            for j in places
        ]
        if places:
            losses.append(_mean(d**2 for d in differences))
    return _mean(losses)


def max_pool(maps, valid, kernel):
    """Lists of pooled vectors of one image (C, h, w), None where nothing is valid, row by row."""
    rows = []
    for top in range(0, valid.shape[0], kernel):
        for left in range(0, valid.shape[1], kernel):
            window = [
                maps[:, y, x]
                for y in range(top, min(top + kernel, valid.shape[0]))
                for x in range(left, min(left + kernel, valid.shape[1]))
                if valid[y, x]
            ]
            rows.append(torch.stack(window) if window else None)
    return rows


def ifvd(student, teacher, labels, valid):
    values = []
    for b in range(len(valid)):
        for y, x in _pixels(valid[b]):
            own = [(v, u) for v, u in _pixels(valid[b]) if labels[b, v, u] == labels[b, y, x]]
            similarity = []
            for maps in (student, teacher):
                centre = torch.stack([maps[b, :, v, u].double() for v, u in own]).mean(0)
                similarity.append(_cosine(maps[b, :, y, x].double(), centre))
            values.append((similarity[0] - similarity[1]) ** 2)
    return _mean(values)


def psd(student, teacher, valid):
    losses = []
    for b in range(len(valid)):
        if not valid[b].any():
            continue
        for j in range(len(student)):
            for i in range(j):
                changes = []
                for maps in (student, teacher):
                    change = attention(maps[j][b], valid[b]) - attention(maps[i][b], valid[b])
                    changes.append(change / change.norm())
                losses.append(((changes[0] - changes[1]) ** 2).sum().item())
    return _mean(losses)


def csd(student, teacher, valid, temperature):
    """Logits (B, K, P), valid (B, P)."""
    losses = []
    for b in range(len(valid)):
        places = [i for i in range(valid.shape[1]) if valid[b, i]]
        if not places:
            continue
        s, t = (torch.softmax(maps[b][:, places].double() / temperature, 1) for maps in (student, teacher))
        for k in range(student.shape[1]):
            for m in range(student.shape[1]):
                overlap = [len(places) * sum(p[k, i] * p[m, i] for i in range(len(places))).item() for p in (s, t)]
                losses.append((overlap[0] - overlap[1]) ** 2)
    return _mean(losses)


def cross_image(student, teacher, valid, temperature):
    """Vectors (B, C, P), valid (B, P)."""
    pairs = []
    images = [b for b in range(len(valid)) if valid[b].any()]
    for m in images:
        for n in images:
            rows = []
            for i in range(valid.shape[1]):
                if not valid[m, i]:
                    continue
                s, t = (
                    torch.tensor(
                        [
                            _cosine(maps[m, :, i].double(), maps[n, :, j].double()) / temperature
                            for j in range(valid.shape[1])
                            if valid[n, j]
                        ]
                    )
                    for maps in (student, teacher)
                )
                rows.append(_kl(t, s))
            pairs.append(_mean(rows))
    return _mean(pairs)


def _pearson(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return _cosine(a, b)


def dist(student, teacher, valid, beta, gamma, temperature):
    s, t = (torch.softmax(maps.double() / temperature, 1) for maps in (student, teacher))
    places = [(b, y, x) for b in range(len(valid)) for y, x in _pixels(valid[b])]
    inter = _mean(1 - _pearson(s[b, :, y, x], t[b, :, y, x]) for b, y, x in places)
    intra = _mean(
        1 - _pearson(*(torch.stack([m[b, k, y, x] for b, y, x in places]) for m in (s, t)))
        for k in range(student.shape[1])
    )
    return temperature**2 * (beta * inter + gamma * intra)


def boundary(labels, valid, radius):
    found = torch.zeros_like(valid)
    for b in range(len(valid)):
        for y, x in _pixels(valid[b]):
            near = {
                labels[b, v, u].item() for v, u in _pixels(valid[b]) if abs(v - y) <= radius and abs(u - x) <= radius
            }
            found[b, y, x] = len(near) > 1
    return found


def omni_contrast(student, teacher, valid, groups, patch, temperature):
    losses = []
    _, channels, height, width = student.shape
    size = channels // groups
    for b in range(len(valid)):
        for top in range(0, height - patch + 1, patch):
            for left in range(0, width - patch + 1, patch):
                places = [(top + i, left + j) for i in range(patch) for j in range(patch)]
                places = [(y, x) for y, x in places if valid[b, y, x]]
                for y, x in places:
                    for g in range(groups):
                        own = slice(g * size, g * size + size)
                        anchor = student[b, own, y, x].double()
                        logits = [-(anchor - teacher[b, own, y, x].double()).abs().sum() / temperature]
                        for v, u in places:
                            for other in range(groups):
                                if other != g:
                                    vector = teacher[b, other * size : other * size + size, v, u].double()
                                    logits.append(-(anchor - vector).abs().sum() / temperature)
                        losses.append(-torch.log_softmax(torch.stack(logits), 0)[0].item())
    return _mean(losses)


def refine(features, valid):
    """One image (C, h, w), at least one valid place: (C, places)."""
    vectors = torch.stack([features[:, y, x].double() for y, x in _pixels(valid)], dim=1)

    def squash(values):
        return torch.sigmoid((values - values.mean()) / values.std(correction=0))

    vectors = vectors * squash(vectors.mean(1) + vectors.amax(1)).unsqueeze(1)
    return vectors * squash(vectors.mean(0) + vectors.amax(0))


def attnfd(student, teacher, valid):
    losses = []
    for b in range(len(valid)):
        if valid[b].any():
            s, t = (refine(maps[b], valid[b]) for maps in (student, teacher))
            losses.append(((s / s.norm() - t / t.norm()) ** 2).sum().item())
    return _mean(losses)


def memory(student, teacher, bank, temperature):
    """Anchors (A, C), a bank (Q, C) with nothing empty."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        logits = [torch.tensor([_cosine(v.double(), q.double()) / temperature for q in bank]) for v in (s, t)]
        losses.append(_kl(logits[1], logits[0]))
    return _mean(losses)
