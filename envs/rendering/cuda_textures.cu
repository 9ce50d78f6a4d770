// The CUDA ray renderer, part 2 of 4: texture pyramids, as textures.py samples them.

struct Patch {  // a point on a geom, in its axes
    V3 local, unit;
    int number;         // box: face; cylinder and capsule: end; mesh: face
    float second, third;  // place in a mesh's face
};

DEVICE int wrap(int x, int size, bool repeats) {
    if (!repeats) return x < 0 ? 0 : x >= size ? size - 1 : x;
    x %= size;
    return x < 0 ? x + size : x;
}

DEVICE V3 bilinear(const Scene &s, const Texture &texture, int side, float u, float v, int level) {
    int width = texture.width[level], height = texture.height[level];
    float x = u * width - 0.5f, y = v * height - 0.5f, left = floorf(x), upper = floorf(y);
    bool repeats = !texture.cube;
    int x0 = wrap((int)left, width, repeats), x1 = wrap((int)left + 1, width, repeats);
    int y0 = wrap((int)upper, height, repeats), y1 = wrap((int)upper + 1, height, repeats);
    const float *first = s.texels + 3 * (size_t)texture.offset[side * MAX_LEVELS + level];
    V3 a = load(first + 3 * (y0 * width + x0)), b = load(first + 3 * (y0 * width + x1));
    V3 c = load(first + 3 * (y1 * width + x0)), d = load(first + 3 * (y1 * width + x1));
    a = a + (b - a) * (x - left);
    c = c + (d - c) * (x - left);
    return a + (c - a) * (y - upper);
}

// du, dv: changes to the next pixels right and down, in texels of level 0.
DEVICE V3 trilinear(const Scene &s, const Texture &texture, int side, float u, float v, float du_dx,
                    float dv_dx, float du_dy, float dv_dy) {
    float longest = fmaxf(du_dx * du_dx + dv_dx * dv_dx, du_dy * du_dy + dv_dy * dv_dy);
    int top = texture.levels - 1;
    float lod = clamp(0.5f * log2f(fmaxf(longest, 1e-12f)), 0.0f, (float)top);
    int fine = (int)lod, coarse = fine + 1 < top ? fine + 1 : top;
    V3 colour = bilinear(s, texture, side, u, v, fine);
    if (lod <= 0.0f) return colour;
    return colour + (bilinear(s, texture, side, u, v, coarse) - colour) * (lod - fine);
}

DEVICE V3 in_direction(const Scene &s, const Texture &texture, V3 direction, V3 dx, V3 dy) {
    // Cube faces +x -x +y -y +z -z: which coordinate is s, t, and their signs (OpenGL 2.1, section 3.8.6).
    V3 size = v3(fabsf(direction.x), fabsf(direction.y), fabsf(direction.z));
    int axis = size.x >= size.y && size.x >= size.z ? 0 : size.y >= size.z ? 1 : 2;
    float major = part(direction, axis);
    bool negative = major < 0.0f;
    int s_axis = axis == 0 ? 2 : 0, t_axis = axis == 1 ? 2 : 1;
    float s_sign = axis == 1 ? 1.0f : (axis == 0) != negative ? -1.0f : 1.0f;
    float t_sign = axis == 1 && !negative ? 1.0f : -1.0f;
    float scale = 1.0f / fmaxf(fabsf(major), 1e-12f), sign = negative ? -1.0f : 1.0f;
    float u = s_sign * part(direction, s_axis) * scale, v = t_sign * part(direction, t_axis) * scale;
    float half_px = 0.5f * texture.width[0] * scale, x = sign * part(dx, axis), y = sign * part(dy, axis);
    return trilinear(s, texture, 2 * axis + negative, u * 0.5f + 0.5f, v * 0.5f + 0.5f,
                     (s_sign * part(dx, s_axis) - u * x) * half_px, (t_sign * part(dx, t_axis) - v * x) * half_px,
                     (s_sign * part(dy, s_axis) - u * y) * half_px, (t_sign * part(dy, t_axis) - v * y) * half_px);
}

DEVICE V3 cube_position(const Geom &g, const Patch &patch) {
    if (g.kind == MESH) return patch.local;
    V3 out = patch.unit;
    if (g.kind == CAPSULE && patch.number) {
        float above = fabsf(out.z) - 1.0f;
        if (above > 0.0f) out.z = copysignf(1.0f + above * (g.size[2] / g.size[0]), out.z);
    }
    return out;
}

struct Uv {
    float u, v;
};

struct Place {  // a place in a 2D texture and its changes to the next pixels right and down
    Uv at, right, down;
};

DEVICE Uv half_of(V3 v, int first, int second) {
    Uv uv = {0.5f * part(v, first), -0.5f * part(v, second)};
    return uv;
}

DEVICE Uv mesh_change(const Face &face, const float *edges, V3 change) {
    float second = dot(load(face.weights), change), third = dot(load(face.weights + 4), change);
    Uv uv = {second * edges[0] + third * edges[2], second * edges[1] + third * edges[3]};
    return uv;
}

DEVICE Place mesh_place(const Scene &s, const Geom &g, const Patch &patch, V3 right, V3 down) {
    const Face &face = s.faces[g.first_face + patch.number];
    const float *uv = face.texcoords;
    float edges[4] = {uv[2] - uv[0], uv[3] - uv[1], uv[4] - uv[0], uv[5] - uv[1]};
    Place place;
    place.at.u = uv[0] + patch.second * edges[0] + patch.third * edges[2];
    place.at.v = uv[1] + patch.second * edges[1] + patch.third * edges[3];
    place.right = mesh_change(face, edges, right * load(g.size));
    place.down = mesh_change(face, edges, down * load(g.size));
    return place;
}

DEVICE Place round_place(const Geom &g, const Patch &patch, V3 right, V3 down) {
    const float pi = 3.14159265358979f;
    V3 p = patch.unit;
    Place place;
    if (g.kind == CYLINDER && patch.number) {
        place.at.u = 0.5f + 0.5f * p.x, place.at.v = 0.5f + 0.5f * p.y;
        place.right.u = 0.5f * right.x, place.right.v = 0.5f * right.y;
        place.down.u = 0.5f * down.x, place.down.v = 0.5f * down.y;
        return place;
    }
    float u = atan2f(p.y, p.x) / (2.0f * pi), v, slope;
    if (g.kind == SPHERE || g.kind == ELLIPSOID) {
        float height = clamp(p.z, -1.0f, 1.0f);
        v = 0.5f - asinf(height) / pi;
        slope = -1.0f / (pi * sqrtf(fmaxf(1.0f - height * height, 1e-6f)));
    } else {
        v = (1.0f - p.z) / 2.0f;
        slope = -0.5f;
    }
    if (g.kind == CAPSULE && patch.number) {
        float aspect = g.size[2] / g.size[0], up = clamp((fabsf(p.z) - 1.0f) * aspect, 0.0f, 1.0f);
        float turned = asinf(up) / (pi / 2.0f);
        v = patch.number == 1 ? 1.0f - turned : turned;
        slope = -aspect / (pi / 2.0f * sqrtf(fmaxf(1.0f - up * up, 1e-6f)));
    }
    float per_turn = 1.0f / (2.0f * pi * fmaxf(p.x * p.x + p.y * p.y, 1e-9f));
    place.at.u = u < 0.0f ? u + 1.0f : u, place.at.v = v;
    place.right.u = (p.x * right.y - p.y * right.x) * per_turn, place.right.v = right.z * slope;
    place.down.u = (p.x * down.y - p.y * down.x) * per_turn, place.down.v = down.z * slope;
    return place;
}

// The texture's colour at a patch; right and down: how unit coordinates change to the next pixels.
DEVICE_CALL V3 painted(const Scene &s, const Geom &g, const Patch &patch, V3 right, V3 down) {
    const Texture &texture = s.textures[g.texture];
    if (texture.cube) {
        V3 scale = load(g.cube_scale), change = g.kind == MESH ? scale * load(g.size) : scale;
        return in_direction(s, texture, cube_position(g, patch) * scale, right * change, down * change);
    }
    float shift = 0.0f;
    Place place;
    if (g.kind == MESH && g.has_texcoords) {
        place = mesh_place(s, g, patch, right, down);
    } else if (g.kind == BOX && !s.frame->projects) {
        int axis = patch.number >> 1, first = axis == 0 ? 1 : 0, second = axis == 2 ? 1 : 2;
        place.at = half_of(patch.unit, first, second);
        place.at.u += 0.5f, place.at.v += 0.5f;
        place.right = half_of(right, first, second), place.down = half_of(down, first, second);
    } else if (g.kind != BOX && g.kind != PLANE && g.kind != MESH && !s.frame->projects) {
        place = round_place(g, patch, right, down);
    } else {
        place.at = half_of(patch.unit, 0, 1), place.right = half_of(right, 0, 1);
        place.down = half_of(down, 0, 1);
        shift = -0.5f;
    }
    float width = g.repeat[0] * texture.width[0], height = g.repeat[1] * texture.height[0];
    return trilinear(s, texture, 0, place.at.u * g.repeat[0] + shift, place.at.v * g.repeat[1] + shift,
                     place.right.u * width, place.right.v * height, place.down.u * width, place.down.v * height);
}
