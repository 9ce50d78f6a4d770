// The CUDA ray renderer, part 1 of 4: what the host hands over, vectors, and where rays meet shapes.
//
// The parts are one source, joined in order by cuda_program.py. Under NVRTC nothing is included; a plain C++
// compiler builds the same text for the CPU (EMUWORLD_HOST), which is how it is tested without a GPU.
//
// Everything is in camera axes (x right, y up, z backward) with the camera at the origin, so that float32 is
// enough; rays are 1 long along the optical axis, so that their parameter is a depth in metres.

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__
#else
#include <math.h>
#define DEVICE static inline
#define DEVICE_CALL static
#endif

// cuda_program.py defines TILE (pixels a side that a block draws), MAX_GEOMS, MAX_LIGHTS, MAX_LEVELS and PARTS.
#define NOTHING 3.0e38f

enum { PLANE = 0, SPHERE = 2, CAPSULE = 3, ELLIPSOID = 4, CYLINDER = 5, BOX = 6, MESH = 7 };  // mjtGeom

// The layouts of cuda_scene.py: every member is 4 bytes wide.
struct Light {
    int directional, has_cone, shades_itself, shines;
    float position[3], direction[3], attenuation[3], cos_cutoff, exponent;
    float ambient[3], diffuse[3], specular[3];
    float half_width, near_m, far_m, right[3], up[3];  // of the shadow map
};

struct Frame {
    int height, width, num_geoms, num_everywhere, num_casting, cells, projects, sky;
    float pixel, ambient, bias_m, slack, nearest_m, offsets[8], sky_turn[9];
    Light lights[MAX_LIGHTS];  // first those that cast no shadow
};

struct Geom {
    int id, kind, texture, first_face, num_faces, has_texcoords;
    float size[3], eye[3], axes[9], centre[3], radius;  // axes: [camera axis][geom axis]; eye in the geom's
    float rgb[3], emission, specular, shininess, repeat[2], cube_scale[3];
};

struct Texture {
    int cube, levels, width[MAX_LEVELS], height[MAX_LEVELS], offset[6 * MAX_LEVELS];
};

struct Face {
    float plane[4], weights[8], normals[9], texcoords[6];
};

struct Scene {
    const Frame *frame;
    const Geom *geoms;
    const Texture *textures;
    const float *texels;
    const Face *faces;
};

struct V3 {
    float x, y, z;
};

DEVICE V3 v3(float x, float y, float z) { V3 v = {x, y, z}; return v; }
DEVICE V3 load(const float *p) { return v3(p[0], p[1], p[2]); }
DEVICE V3 operator+(V3 a, V3 b) { return v3(a.x + b.x, a.y + b.y, a.z + b.z); }
DEVICE V3 operator-(V3 a, V3 b) { return v3(a.x - b.x, a.y - b.y, a.z - b.z); }
DEVICE V3 operator*(V3 a, V3 b) { return v3(a.x * b.x, a.y * b.y, a.z * b.z); }
DEVICE V3 operator*(V3 a, float s) { return v3(a.x * s, a.y * s, a.z * s); }
DEVICE V3 operator/(V3 a, V3 b) { return v3(a.x / b.x, a.y / b.y, a.z / b.z); }
DEVICE float dot(V3 a, V3 b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
DEVICE float part(V3 a, int k) { return k == 0 ? a.x : k == 1 ? a.y : a.z; }
DEVICE float clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
DEVICE V3 least(V3 a, float s) { return v3(fminf(a.x, s), fminf(a.y, s), fminf(a.z, s)); }
DEVICE V3 unit_of(V3 a) { return a * (1.0f / fmaxf(sqrtf(dot(a, a)), 1e-9f)); }
DEVICE float not_zero(float x) { return fabsf(x) < 1e-12f ? (x < 0.0f ? -1e-12f : 1e-12f) : x; }

DEVICE V3 to_local(const Geom &g, V3 v) {
    const float *a = g.axes;
    return v3(v.x * a[0] + v.y * a[3] + v.z * a[6], v.x * a[1] + v.y * a[4] + v.z * a[7],
              v.x * a[2] + v.y * a[5] + v.z * a[8]);
}

DEVICE V3 to_camera(const Geom &g, V3 v) {
    const float *a = g.axes;
    return v3(a[0] * v.x + a[1] * v.y + a[2] * v.z, a[3] * v.x + a[4] * v.y + a[5] * v.z,
              a[6] * v.x + a[7] * v.y + a[8] * v.z);
}

// Where a line is inside of a convex shape: from t0 to t1. Empty: t0 > t1.
struct Span {
    float t0, t1;
};

DEVICE void take_in(Span &span, float t, bool valid) {
    if (valid) {
        span.t0 = fminf(span.t0, t);
        span.t1 = fmaxf(span.t1, t);
    }
}

// Roots of a t^2 + 2 b t + c; false if there are none.
DEVICE bool roots(float a, float b, float c, float &t0, float &t1) {
    float square = b * b - a * c;
    if (square <= 0.0f || a <= 0.0f) return false;
    float root = sqrtf(square);
    t0 = (-b - root) / a;
    t1 = (-b + root) / a;
    return true;
}

DEVICE Span ball_span(V3 o, V3 d, float radius) {
    // From the point nearest to the centre: without cancellation for small balls far away.
    float a = dot(d, d), middle = -dot(o, d) / a;
    V3 nearest = o + d * middle;
    float square = radius * radius - dot(nearest, nearest);
    Span span = {NOTHING, -NOTHING};
    if (square <= 0.0f) return span;
    float half = sqrtf(square / a);
    span.t0 = middle - half;
    span.t1 = middle + half;
    return span;
}

DEVICE Span box_span(V3 o, V3 d, V3 size) {
    V3 inverse = v3(1.0f / not_zero(d.x), 1.0f / not_zero(d.y), 1.0f / not_zero(d.z));
    V3 a = (v3(-size.x, -size.y, -size.z) - o) * inverse, b = (size - o) * inverse;
    Span span = {fmaxf(fmaxf(fminf(a.x, b.x), fminf(a.y, b.y)), fminf(a.z, b.z)),
                 fminf(fminf(fmaxf(a.x, b.x), fmaxf(a.y, b.y)), fmaxf(a.z, b.z))};
    return span;
}

// Of cylinders and capsules: along z, size = (radius, radius, half length).
DEVICE Span tube_span(V3 o, V3 d, V3 size, bool round_ends) {
    Span span = {NOTHING, -NOTHING};
    float radius = size.x, half = size.z, a = d.x * d.x + d.y * d.y;
    if (a > 1e-14f) {
        float middle = -(o.x * d.x + o.y * d.y) / a;
        float x = o.x + middle * d.x, y = o.y + middle * d.y, square = radius * radius - x * x - y * y;
        if (square <= 0.0f) return span;
        float reach = sqrtf(square / a);
        take_in(span, middle - reach, fabsf(o.z + (middle - reach) * d.z) <= half);
        take_in(span, middle + reach, fabsf(o.z + (middle + reach) * d.z) <= half);
    }
    for (int end = -1; end <= 1; end += 2) {
        if (round_ends) {
            Span cap = ball_span(v3(o.x, o.y, o.z - end * half), d, radius);
            if (cap.t0 <= cap.t1) {
                take_in(span, cap.t0, end * (o.z + cap.t0 * d.z) >= half);
                take_in(span, cap.t1, end * (o.z + cap.t1 * d.z) >= half);
            }
        } else if (fabsf(d.z) > 1e-12f) {
            float t = (end * half - o.z) / d.z, x = o.x + t * d.x, y = o.y + t * d.y;
            take_in(span, t, x * x + y * y <= radius * radius);
        }
    }
    return span;
}

DEVICE Span convex_span(int kind, V3 o, V3 d, V3 size) {
    if (kind == BOX) return box_span(o, d, size);
    if (kind == SPHERE) return ball_span(o, d, size.x);
    if (kind == ELLIPSOID) return ball_span(o / size, d / size, 1.0f);
    return tube_span(o, d, size, kind == CAPSULE);
}

// A rendered rectangle, seen from the front only; a size of (nearly) 0 is infinite. Gives t or NOTHING.
DEVICE float plane_hit(V3 o, V3 d, V3 size) {
    if (d.z >= 0.0f) return NOTHING;
    float t = -o.z / d.z, x = o.x + t * d.x, y = o.y + t * d.y;
    bool inside = (size.x < 1e-8f || fabsf(x) <= size.x) && (size.y < 1e-8f || fabsf(y) <= size.y);
    return t >= 0.0f && inside ? t : NOTHING;
}

DEVICE float at_point(const float *affine, V3 p) {
    return affine[0] * p.x + affine[1] * p.y + affine[2] * p.z + affine[3];
}

// The t at which a ray meets a triangle's plane inside of it, from either side, or NOTHING.
DEVICE float face_hit(const Face &face, V3 o, V3 d) {
    float t = -at_point(face.plane, o) / not_zero(dot(load(face.plane), d));
    V3 p = o + d * t;
    float second = at_point(face.weights, p), third = at_point(face.weights + 4, p);
    const float slack = 1e-5f;  // no gap between neighbours
    return second >= -slack && third >= -slack && second + third <= 1.0f + slack ? t : NOTHING;
}

// Where a ray first meets a geom, t >= 0, or NOTHING. As in a
// picture of faces, a box around the camera is not drawn.
DEVICE float first_hit(const Scene &s, const Geom &g, V3 o, V3 d, int &face) {
    V3 size = load(g.size);
    if (g.kind == BOX) {
        Span span = box_span(o, d, size * (1.0f + s.frame->slack));
        if (span.t0 > span.t1 || span.t1 < 0.0f) return NOTHING;
        bool inside = fabsf(o.x) <= size.x && fabsf(o.y) <= size.y && fabsf(o.z) <= size.z;
        return inside ? NOTHING : fmaxf(span.t0, 0.0f);
    }
    if (g.kind == PLANE) return plane_hit(o, d, size);
    if (g.kind == MESH) {
        float best = NOTHING;
        Span bound = ball_span(o, d, g.radius);
        if (bound.t0 > bound.t1 || bound.t1 < 0.0f) return NOTHING;
        for (int i = 0; i < g.num_faces; i++) {
            float t = face_hit(s.faces[g.first_face + i], o, d);
            if (t >= 0.0f && t < best) {
                best = t;
                face = i;
            }
        }
        return best;
    }
    Span span = convex_span(g.kind, o, d, size);
    if (span.t0 > span.t1 || span.t1 < 0.0f) return NOTHING;
    return span.t0 >= 0.0f ? span.t0 : span.t1;
}

// Whether a geom stands on the way from p (camera axes) along d to a light: the first thing that the light
// meets, if that is further than bias_m from p. reach: the t of the light. length: of d, in metres.
DEVICE bool stands_between(const Scene &s, const Geom &g, V3 p, V3 d, float reach, float length) {
    if (g.kind == PLANE) return false;  // as in shadows.py, whose coarse map knows none
    float bias = s.frame->bias_m / length;
    V3 away = p - load(g.centre);
    // Most are far from the way, or behind p: known without a division.
    float along = dot(away, d), square = length * length, outside = dot(away, away) - g.radius * g.radius;
    if (outside > 0.0f && (along > 0.0f || along * along < outside * square)) return false;
    V3 o = to_local(g, away), local = to_local(g, d), size = load(g.size);
    if (g.kind == MESH) {
        for (int i = 0; i < g.num_faces; i++) {
            float t = face_hit(s.faces[g.first_face + i], o, local);
            if (t > bias && t <= reach) return true;
        }
        return false;
    }
    Span span = convex_span(g.kind, o, local, size);
    if (span.t0 > span.t1) return false;
    return (span.t1 <= reach && span.t1 > bias) || (span.t1 > reach && span.t0 <= reach && span.t0 > bias);
}
