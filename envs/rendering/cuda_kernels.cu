// The CUDA ray renderer, part 4 of 4: first hits, a ray's colour, and the kernels.

struct Hit {
    int index, face;  // of the geom (-1: none) in the packed list, and of a mesh's face
    float depth;
};

// list: the numbers of the geoms that this tile may see.
DEVICE Hit trace(const Scene &s, const unsigned short *list, int count, V3 d) {
    Hit best = {-1, 0, NOTHING};
    for (int i = 0; i < count; i++) {
        int index = list[i], face = 0;
        const Geom &g = s.geoms[index];
        float t = first_hit(s, g, load(g.eye), to_local(g, d), face);
        // Of equals the first one wins, in whatever order the list is.
        if (t < best.depth || (t == best.depth && t < NOTHING && index < best.index)) {
            best.index = index;
            best.face = face;
            best.depth = t;
        }
    }
    return best;
}

DEVICE Patch patch_of(const Scene &s, const Geom &g, V3 local, int face) {
    Patch patch = {local, local / load(g.size), 0, 0.0f, 0.0f};
    V3 p = patch.unit;
    if (g.kind == BOX) {
        V3 size = v3(fabsf(p.x), fabsf(p.y), fabsf(p.z));
        int axis = size.x >= size.y && size.x >= size.z ? 0 : size.y >= size.z ? 1 : 2;
        patch.number = 2 * axis + (part(p, axis) > 0.0f);
    } else if (g.kind == CYLINDER) {
        patch.number = p.z * p.z > p.x * p.x + p.y * p.y ? (p.z > 0.0f ? 1 : 2) : 0;
    } else if (g.kind == CAPSULE) {
        patch.number = p.z > 1.0f ? 1 : p.z < -1.0f ? 2 : 0;
    } else if (g.kind == MESH) {
        const Face &hit = s.faces[g.first_face + face];
        patch.number = face;
        patch.second = at_point(hit.weights, local);
        patch.third = at_point(hit.weights + 4, local);
    }
    return patch;
}

// Unit, out of the geom, in its axes; of a mesh its face's.
DEVICE V3 true_normal(const Scene &s, const Geom &g, const Patch &patch) {
    V3 p = patch.local;
    if (g.kind == BOX) {
        float side = patch.number & 1 ? 1.0f : -1.0f;
        int axis = patch.number >> 1;
        return v3(axis == 0 ? side : 0.0f, axis == 1 ? side : 0.0f, axis == 2 ? side : 0.0f);
    }
    if (g.kind == PLANE) return v3(0.0f, 0.0f, 1.0f);
    if (g.kind == MESH) return load(s.faces[g.first_face + patch.number].plane);
    if (g.kind == ELLIPSOID) return unit_of(patch.unit / load(g.size));
    if (g.kind == SPHERE) return unit_of(p);
    float end = patch.number == 1 ? 1.0f : -1.0f;
    if (g.kind == CYLINDER && patch.number) return v3(0.0f, 0.0f, end);
    return unit_of(v3(p.x, p.y, patch.number ? p.z - end * g.size[2] : 0.0f));
}

DEVICE V3 blended_normal(const Scene &s, const Geom &g, const Patch &patch) {
    const float *n = s.faces[g.first_face + patch.number].normals;
    V3 first = load(n);
    return unit_of(first + (load(n + 3) - first) * patch.second + (load(n + 6) - first) * patch.third);
}

DEVICE V3 sky_colour(const Scene &s, V3 d) {
    const Frame &frame = *s.frame;
    if (frame.sky < 0) return v3(0.0f, 0.0f, 0.0f);
    const float *a = frame.sky_turn;
    V3 direction = v3(dot(load(a), d), dot(load(a + 3), d), dot(load(a + 6), d));
    return in_direction(s, s.textures[frame.sky], direction, v3(a[0], a[3], a[6]) * frame.pixel,
                        v3(a[1], a[4], a[7]) * -frame.pixel);
}

// A ray's colour, each channel 0..1, and the number of the surface it shows: -1 for the sky.
DEVICE_CALL V3 ray_colour(const Scene &s, const unsigned short *list, int count, V3 d, int &surface) {
    const Frame &frame = *s.frame;
    Hit hit = trace(s, list, count, d);
    surface = -1;
    if (hit.index < 0) return sky_colour(s, d);
    const Geom &g = s.geoms[hit.index];
    V3 slope = to_local(g, d);
    Patch patch = patch_of(s, g, slope * hit.depth + load(g.eye), hit.face);
    surface = g.id * PARTS + patch.number;
    V3 normal = true_normal(s, g, patch), p = d * hit.depth;
    V3 shading = to_camera(g, g.kind == MESH ? blended_normal(s, g, patch) : normal);
    Cell cell = {0, 0, 0, 0.0f, 0.0f, 0.0f};
    if (g.kind == BOX) cell = cell_at(frame, patch);
    V3 colour = v3(0.0f, 0.0f, 0.0f);
    for (int pass = 0; pass <= frame.num_casting; pass++) {
        V3 light = g.kind == BOX ? box_pass(frame, g, pass, cell, shading) : pass_at(frame, g, pass, p, shading);
        if (pass && !(light.x + light.y + light.z > 0.0f)) continue;
        if (!pass || reaches(s, frame.lights[frame.num_everywhere + pass - 1], p, hit.index))
            colour = colour + light;
    }
    if (g.texture >= 0) {
        // Changes to the next pixels on the plane that touches the geom here.
        float along = dot(slope, normal);
        float depth_over_along = hit.depth / (fabsf(along) < 1e-6f ? 1e-6f : along);
        const float *a = g.axes;
        V3 step_x = v3(a[0], a[1], a[2]) * frame.pixel, step_y = v3(a[3], a[4], a[5]) * frame.pixel;
        V3 right = step_x * hit.depth - slope * (dot(normal, step_x) * depth_over_along);
        V3 up = step_y * hit.depth - slope * (dot(normal, step_y) * depth_over_along);
        colour = colour * painted(s, g, patch, right / load(g.size), up / load(g.size) * -1.0f);
    }
    return least(colour, 1.0f);
}

// The ray through a pixel, at offsets right and down from its upper left corner.
DEVICE V3 pixel_ray(const Frame &frame, float column, float row) {
    return v3((column - 0.5f * frame.width) * frame.pixel, (0.5f * frame.height - row) * frame.pixel, -1.0f);
}

// Whether a geom may be seen in the tile that starts at a pixel: no side of the tile's frustum excludes it.
DEVICE bool may_be_in_tile(const Frame &frame, const Geom &g, int column, int row) {
    if (g.kind == PLANE) return true;
    V3 c = load(g.centre), low = pixel_ray(frame, column, row + TILE), high = pixel_ray(frame, column + TILE, row);
    V3 sides[5] = {v3(1.0f, 0.0f, low.x), v3(-1.0f, 0.0f, -high.x), v3(0.0f, 1.0f, low.y),
                   v3(0.0f, -1.0f, -high.y), v3(0.0f, 0.0f, -1.0f)};  // inward
    for (int i = 0; i < 5; i++) {
        V3 across = to_local(g, sides[i]);
        float reach = g.radius * sqrtf(dot(sides[i], sides[i]));
        if (g.kind == BOX)
            reach = fabsf(across.x) * g.size[0] + fabsf(across.y) * g.size[1] + fabsf(across.z) * g.size[2];
        if (dot(c, sides[i]) < -reach * 1.0001f - 1e-5f) return false;
    }
    return true;
}

DEVICE bool is_edge(const Frame &frame, const int *surfaces, int column, int row) {
    int at = row * frame.width + column, mine = surfaces[at];
    return (column > 0 && surfaces[at - 1] != mine) || (column + 1 < frame.width && surfaces[at + 1] != mine) ||
           (row > 0 && surfaces[at - frame.width] != mine) ||
           (row + 1 < frame.height && surfaces[at + frame.width] != mine);
}

DEVICE void put(unsigned char *out, V3 colour) {
    out[0] = (unsigned char)(colour.x * 255.0f + 0.5f);
    out[1] = (unsigned char)(colour.y * 255.0f + 0.5f);
    out[2] = (unsigned char)(colour.z * 255.0f + 0.5f);
}

DEVICE void draw_pixel(const Scene &s, const unsigned short *list, int count, int column, int row, int *surfaces,
                       unsigned char *out) {
    int at = row * s.frame->width + column, surface;
    V3 colour = ray_colour(s, list, count, pixel_ray(*s.frame, column + 0.5f, row + 0.5f), surface);
    surfaces[at] = surface;
    put(out + 3 * at, colour);
}

DEVICE V3 sample_colour(const Scene &s, const unsigned short *list, int count, int column, int row, int sample) {
    const float *offset = s.frame->offsets + 2 * sample;
    int surface;
    return ray_colour(s, list, count, pixel_ray(*s.frame, column + offset[0], row + offset[1]), surface);
}

DEVICE void find_pixel(const Scene &s, const unsigned short *list, int count, int column, int row, int *geoms,
                       float *depths) {
    Hit hit = trace(s, list, count, pixel_ray(*s.frame, column + 0.5f, row + 0.5f));
    int at = row * s.frame->width + column;
    geoms[at] = hit.index < 0 ? -1 : s.geoms[hit.index].id;
    depths[at] = hit.depth;
}

DEVICE Scene scene_of(const Frame *frame, const Texture *textures, const float *texels, const Face *faces) {
    Scene s = {frame, (const Geom *)(frame + 1), textures, texels, faces};
    return s;
}

#define ARGUMENTS const Frame *frame, const Texture *textures, const float *texels, const Face *faces, \
                  int *surfaces, float *depths, unsigned char *out

#ifdef __CUDACC__

DEVICE int list_tile(const Scene &s, unsigned short *list, int *count) {
    int thread = threadIdx.y * TILE + threadIdx.x;
    if (thread == 0) *count = 0;
    __syncthreads();
    for (int i = thread; i < s.frame->num_geoms; i += TILE * TILE)
        if (may_be_in_tile(*s.frame, s.geoms[i], blockIdx.x * TILE, blockIdx.y * TILE))
            list[atomicAdd(count, 1)] = (unsigned short)i;
    __syncthreads();
    return *count;
}

#define BLOCK(use)                                                                        \
    __shared__ unsigned short list[MAX_GEOMS];                                            \
    __shared__ int shared_count;                                                          \
    Scene s = scene_of(frame, textures, texels, faces);                                   \
    int count = list_tile(s, list, &shared_count);                                        \
    int column = blockIdx.x * TILE + threadIdx.x, row = blockIdx.y * TILE + threadIdx.y; \
    bool inside = column < frame->width && row < frame->height;                           \
    use

extern "C" __global__ void __launch_bounds__(TILE * TILE) draw_pixels(ARGUMENTS) {
    BLOCK(if (inside) draw_pixel(s, list, count, column, row, surfaces, out);)
}

extern "C" __global__ void __launch_bounds__(TILE * TILE) find_pixels(ARGUMENTS) {
    BLOCK(if (inside) find_pixel(s, list, count, column, row, surfaces, depths);)
}

// Four threads an edge pixel, one a sample.
extern "C" __global__ void __launch_bounds__(TILE * TILE) smooth_edges(ARGUMENTS) {
    __shared__ unsigned short edges[TILE * TILE];
    __shared__ int num_edges;
    __shared__ V3 colours[TILE * TILE];
    int thread = threadIdx.y * TILE + threadIdx.x;
    if (thread == 0) num_edges = 0;
    BLOCK(if (inside && is_edge(*frame, surfaces, column, row))
              edges[atomicAdd(&num_edges, 1)] = (unsigned short)thread;)
    __syncthreads();
    for (int first = 0; first < num_edges; first += TILE * TILE / 4) {
        int mine = first + thread / 4;
        if (mine < num_edges) {
            int x = blockIdx.x * TILE + edges[mine] % TILE, y = blockIdx.y * TILE + edges[mine] / TILE;
            colours[thread] = sample_colour(s, list, count, x, y, thread % 4);
        }
        __syncthreads();
        if (mine < num_edges && thread % 4 == 0) {
            int x = blockIdx.x * TILE + edges[mine] % TILE, y = blockIdx.y * TILE + edges[mine] / TILE;
            V3 sum = colours[thread] + colours[thread + 1] + colours[thread + 2] + colours[thread + 3];
            put(out + 3 * (y * frame->width + x), sum * 0.25f);
        }
        __syncthreads();
    }
}

#endif

#ifdef EMUWORLD_HOST

// What the kernels do, pixel by pixel on the CPU. kernel: 0 draw_pixels, 1 smooth_edges, 2 find_pixels.
extern "C" void run_on_host(int kernel, ARGUMENTS) {
    Scene s = scene_of(frame, textures, texels, faces);
    unsigned short list[MAX_GEOMS];
    for (int top = 0; top < frame->height; top += TILE)
        for (int left = 0; left < frame->width; left += TILE) {
            int count = 0;
            for (int i = frame->num_geoms - 1; i >= 0; i--)  // any order is right
                if (may_be_in_tile(*frame, s.geoms[i], left, top)) list[count++] = (unsigned short)i;
            for (int row = top; row < top + TILE && row < frame->height; row++)
                for (int column = left; column < left + TILE && column < frame->width; column++) {
                    if (kernel == 0) draw_pixel(s, list, count, column, row, surfaces, out);
                    if (kernel == 2) find_pixel(s, list, count, column, row, surfaces, depths);
                    if (kernel == 1 && is_edge(*frame, surfaces, column, row)) {
                        V3 sum = v3(0.0f, 0.0f, 0.0f);
                        for (int i = 0; i < 4; i++) sum = sum + sample_colour(s, list, count, column, row, i);
                        put(out + 3 * (row * frame->width + column), sum * 0.25f);
                    }
                }
        }
}

#endif
