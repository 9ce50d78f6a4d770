// The CUDA ray renderer, part 3 of 4: the light of OpenGL's fixed pipeline, and shadows (lighting.py,
// shadows.py). Pass 0 holds everything without shadow; pass 1 + i is the i-th light that casts one.

DEVICE V3 light_at(const Light &light, const Geom &g, V3 p, V3 normal, V3 view) {
    V3 towards;
    float strength = 1.0f;
    if (light.directional) {
        towards = load(light.direction) * -1.0f;
    } else {
        towards = load(light.position) - p;
        float distance = sqrtf(dot(towards, towards));
        towards = towards * (1.0f / fmaxf(distance, 1e-9f));
        const float *fading = light.attenuation;
        strength = 1.0f / fmaxf(fading[0] + distance * (fading[1] + fading[2] * distance), 1e-9f);
        if (light.has_cone) {
            float along = -dot(towards, load(light.direction));
            if (along < light.cos_cutoff) return v3(0.0f, 0.0f, 0.0f);
            if (light.exponent != 0.0f) strength *= powf(fmaxf(along, 0.0f), light.exponent);
        }
    }
    float facing = dot(normal, towards);
    V3 colour = load(g.rgb) * (load(light.ambient) + load(light.diffuse) * fmaxf(facing, 0.0f));
    if (light.shines && facing > 0.0f && g.specular > 0.0f) {
        float glance = dot(normal, unit_of(towards + view));
        if (glance > 0.0f) colour = colour + load(light.specular) * (g.specular * powf(glance, g.shininess));
    }
    return colour * strength;
}

DEVICE V3 pass_at(const Frame &frame, const Geom &g, int pass, V3 p, V3 normal) {
    V3 view = unit_of(p * -1.0f);
    if (pass) return least(light_at(frame.lights[frame.num_everywhere + pass - 1], g, p, normal, view), 1.0f);
    V3 sum = load(g.rgb) * (g.emission + frame.ambient);
    for (int i = 0; i < frame.num_everywhere; i++)
        sum = sum + light_at(frame.lights[i], g, p, normal, view);
    return least(sum, 1.0f);
}

// A grid cell and the place in it, 0..1, of a position in -1..1.
DEVICE int cell_of(float position, int cells, float &place) {
    float scaled = (position + 1.0f) * (0.5f * cells);
    int cell = (int)scaled;
    cell = cell < 0 ? 0 : cell >= cells ? cells - 1 : cell;
    place = scaled - cell;
    return cell;
}

struct Cell {  // of a box face's grid, at whose corners OpenGL computes the light
    int axis, row, column;
    float side, x, y;
};

DEVICE Cell cell_at(const Frame &frame, const Patch &patch) {
    Cell cell;
    cell.axis = patch.number >> 1;
    cell.side = patch.number & 1 ? 1.0f : -1.0f;
    cell.row = cell_of(part(patch.unit, (cell.axis + 1) % 3), frame.cells, cell.x);
    cell.column = cell_of(part(patch.unit, (cell.axis + 2) % 3), frame.cells, cell.y);
    return cell;
}

DEVICE V3 box_pass(const Frame &frame, const Geom &g, int pass, const Cell &cell, V3 normal) {
    V3 sum = v3(0.0f, 0.0f, 0.0f);
    V3 size = load(g.size), centre = load(g.centre);
    float step = 2.0f / frame.cells;
    for (int corner = 0; corner < 4; corner++) {
        int down = corner >> 1, across = corner & 1;
        float first = (cell.row + down) * step - 1.0f, second = (cell.column + across) * step - 1.0f;
        V3 unit = cell.axis == 0   ? v3(cell.side, first, second)
                  : cell.axis == 1 ? v3(second, cell.side, first)
                                   : v3(first, second, cell.side);
        float weight = (down ? cell.x : 1.0f - cell.x) * (across ? cell.y : 1.0f - cell.y);
        sum = sum + pass_at(frame, g, pass, to_camera(g, unit * size) + centre, normal) * weight;
    }
    return sum;
}

// Whether a casting light reaches a point of geom number `own`; where its shadow map ends, it does.
DEVICE_CALL bool reaches(const Scene &s, const Light &light, V3 p, int own) {
    V3 away = p - load(light.position);
    float x = dot(away, load(light.right)), y = dot(away, load(light.up));
    float depth = dot(away, load(light.direction));
    if (!light.directional) {
        float scale = 1.0f / fmaxf(depth, s.frame->nearest_m);
        x *= scale;
        y *= scale;
    }
    bool in_map = fabsf(x) < light.half_width && fabsf(y) < light.half_width && depth < light.far_m &&
                  depth > light.near_m;
    if (!in_map) return true;
    V3 d = light.directional ? load(light.direction) * -1.0f : away * -1.0f;
    float reach = light.directional ? 1e30f : 1.0f, length = sqrtf(dot(d, d));
    for (int i = 0; i < s.frame->num_geoms; i++) {
        const Geom &g = s.geoms[i];
        // A point that faces the light is not behind its own geom, if that is convex.
        if (i == own && !light.shades_itself && g.kind != MESH) continue;
        if (stands_between(s, g, p, d, reach, length)) return false;
    }
    return true;
}
