/* The turns of a loop that are passed over: what is done at each of their ops and lines.

   Plain C against the limited API of Python 3.10. It is the short way of an op or a line of which
   nothing is recorded, and says nothing that the Python of `function_mode.py`, `passed.py` and
   `places.py` in `ops/`, `frames.py`, `deferred.py` and `thinning.py` in `lines/` does not say too:
   that serves where this is not built, and both read and write the same attributes. Python takes
   over where it is otherwise: before anything was counted (another place, a step that ends), or
   with what was counted (news, a shape that is another, a turn that is recorded).

   No code of the user's runs in here but the op itself: what is asked are attributes of our own
   objects, of frames, and of tensors that are exactly torch's. */

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>
#include <stddef.h>
#include <structmember.h>

/* Attributes, methods and keys by name. */
#define ALL_NAMES(_)                                                                               \
    _(__dict__) _(__enter__) _(__exit__) _(__name__) _(_is_alone) _(_is_compiling_flag) _(_last)   \
    _(_names) _(_on_call) _(_version) _(address) _(begin) _(busy) _(closures) _(co_flags)          \
    _(co_name) _(event) _(f_back) _(f_code) _(f_lasti) _(f_lineno) _(f_locals) _(fault)            \
    _(forget_passed) _(full) _(go_on) _(has_containers) _(inplace) _(isdisjoint) _(known) _(line)  \
    _(lines) _(look_back) _(look_back_at) _(most_passed) _(on) _(ops) _(out) _(passed)             \
    _(passed_over) _(places) _(plain) _(recorder) _(ref) _(replaying) _(rest) _(rules) _(seq)      \
    _(shape) _(stack) _(step) _(stepped) _(tensors) _(thins_ops) _(update) _(version)

/* What Python tells: state, functions and classes of torch's and ours. */
#define ALL_PARTS(_)                                                                               \
    _(slot) _(here) _(compiler) _(clock) _(guard) _(op_of) _(tracing_state) _(next_node)           \
    _(mode_count) _(is_quiet) _(tensor) _(is_met) _(decide) _(turn) _(has_news) _(record_late)     \
    _(raise_late) _(held) _(no_names)

#define NAME(name) N_##name,
#define PART(name) P_##name,
#define TEXT(name) #name,
enum { ALL_NAMES(NAME) NAMES };
enum { ALL_PARTS(PART) PARTS };
static const char *const TEXTS[NAMES] = {ALL_NAMES(TEXT)}, *const TOLD[PARTS] = {ALL_PARTS(TEXT)};
static PyObject *names[NAMES], *parts[PARTS], *zero;

#define NESTED 0x10 /* CO_NESTED of `inspect` */

/* Objects all, as in slots: Python reads those faster than numbers in a struct. */
#define OBJECTS 19
#define STATE(...)                                                                                 \
    PyObject_HEAD union {                                                                          \
        PyObject *objects[OBJECTS];                                                                \
        struct {                                                                                   \
            PyObject *__VA_ARGS__;                                                                 \
        };                                                                                         \
    }

typedef struct {
    STATE(tracer, *recorder, *theirs, *variables, *local, *thinning, *deferred, *began, *step,
          *line, *last, *nth, *undisturbed, *closures, *since, *raised_at, *recorded, *has_news,
          *goes_on);
} Frame;

typedef struct {
    STATE(outline, *shape, *dtype, *step, *line, *runs, *turns, *is_bad);
} Place;

typedef struct {
    STATE(special, *counts, *shapes, *passed, *owed, *statement, *leaving, *again);
} Thinning;

typedef struct {
    STATE(count, *first, *seq, *nth, *host_ns);
} Passed;

typedef struct {
    STATE(stores, *names, *lines, *disturbed);
} Deferred;

#define MEMBER(type, field, name) {name, T_OBJECT_EX, offsetof(type, field), 0, NULL}
#define END {NULL, 0, 0, 0, NULL}

static PyMemberDef frame_members[] = {
    MEMBER(Frame, tracer, "tracer"), MEMBER(Frame, recorder, "recorder"),
    MEMBER(Frame, theirs, "theirs"), MEMBER(Frame, variables, "variables"),
    MEMBER(Frame, local, "local"), MEMBER(Frame, thinning, "_thinning"),
    MEMBER(Frame, deferred, "_deferred"), MEMBER(Frame, began, "began"),
    MEMBER(Frame, step, "_step"), MEMBER(Frame, line, "_line"), MEMBER(Frame, last, "_last"),
    MEMBER(Frame, nth, "_nth"), MEMBER(Frame, undisturbed, "_undisturbed"),
    MEMBER(Frame, closures, "_closures"), MEMBER(Frame, since, "_since"),
    MEMBER(Frame, raised_at, "_raised_at"), MEMBER(Frame, recorded, "recorded"),
    MEMBER(Frame, has_news, "has_news"), MEMBER(Frame, goes_on, "_goes_on"), END};
static PyMemberDef place_members[] = {
    MEMBER(Place, outline, "_outline"), MEMBER(Place, shape, "_shape"),
    MEMBER(Place, dtype, "_dtype"), MEMBER(Place, step, "_step"), MEMBER(Place, line, "_line"),
    MEMBER(Place, runs, "runs"), MEMBER(Place, turns, "_turns"), MEMBER(Place, is_bad, "_is_bad"),
    END};
static PyMemberDef thinning_members[] = {
    MEMBER(Thinning, special, "_special"), MEMBER(Thinning, counts, "_counts"),
    MEMBER(Thinning, shapes, "_shapes"), MEMBER(Thinning, passed, "passed"),
    MEMBER(Thinning, owed, "owed"), MEMBER(Thinning, statement, "_statement"),
    MEMBER(Thinning, leaving, "_leaving"), MEMBER(Thinning, again, "_again"), END};
static PyMemberDef passed_members[] = {
    MEMBER(Passed, count, "count"), MEMBER(Passed, first, "first"), MEMBER(Passed, seq, "seq"),
    MEMBER(Passed, nth, "nth"), MEMBER(Passed, host_ns, "host_ns"), END};
static PyMemberDef deferred_members[] = {
    MEMBER(Deferred, stores, "_stores"), MEMBER(Deferred, names, "_names"),
    MEMBER(Deferred, lines, "lines"), MEMBER(Deferred, disturbed, "disturbed"), END};

#define HOME "tensortrace.capture.compiled._turns."
enum { FRAME, PLACE, THINNING, PASSED, DEFERRED, STATES };
static const struct {
    const char *name;
    int size;
    PyMemberDef *members;
} KINDS[STATES] = {{HOME "FrameTrace", sizeof(Frame), frame_members},
                   {HOME "Place", sizeof(Place), place_members},
                   {HOME "Thinning", sizeof(Thinning), thinning_members},
                   {HOME "Passed", sizeof(Passed), passed_members},
                   {HOME "Deferred", sizeof(Deferred), deferred_members}};
static PyTypeObject *states[STATES];

static int traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < OBJECTS; i++) Py_VISIT(((Frame *)self)->objects[i]);
    return 0;
}

static int clear(PyObject *self) {
    for (int i = 0; i < OBJECTS; i++) Py_CLEAR(((Frame *)self)->objects[i]);
    return 0;
}

static void dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int is_a(PyObject *object, int kind) {
    return object && PyObject_TypeCheck(object, states[kind]);
}

static PyObject *owned(PyObject *borrowed) {
    Py_XINCREF(borrowed);
    return borrowed;
}

static PyObject *get(PyObject *object, int name) { return PyObject_GetAttr(object, names[name]); }

static int set(PyObject *object, int name, PyObject *value) {
    return PyObject_SetAttr(object, names[name], value);
}

/* What a dict has under a key, borrowed; NULL where it has nothing, or is no dict. */
static PyObject *find(PyObject *dict, PyObject *key) {
    return dict && key && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : NULL;
}

/* The same of the attributes of an object of ours. Half the time of asking for one. */
static PyObject *its(PyObject *attributes, int name) { return find(attributes, names[name]); }

/* A whole number; -1 for whatever else it is, also nothing. */
static long long number(PyObject *value) {
    return value && PyLong_CheckExact(value) ? PyLong_AsLongLong(value) : -1;
}

/* Let a member be another object, which it takes. 0, or -1 if there is none. */
static int put(PyObject **member, PyObject *value) {
    PyObject *before = *member;
    if (!value) return -1;
    *member = value;
    Py_XDECREF(before);
    return 0;
}

static int put_number(PyObject **member, long long value) {
    return put(member, PyLong_FromLongLong(value));
}

static int set_number(PyObject *attributes, int name, long long value) {
    PyObject *made = PyLong_FromLongLong(value);
    int failed = made ? PyDict_SetItem(attributes, names[name], made) : -1;
    Py_XDECREF(made);
    return failed;
}

static int add_one(PyObject *attributes, int name) {
    PyObject *value = its(attributes, name);
    return value ? set_number(attributes, name, PyLong_AsLongLong(value) + 1) : -1;
}

/* As `turns.is_taken`. */
static int is_taken(long long nth) { return nth < 3 || !((nth + 1) & nth); }

/* Whether this is the recorder at work, and a part of it is on; -1 with an error set. */
static int is_at_work(PyObject *recorder, PyObject *attributes, int part) {
    PyObject *now = get(parts[P_slot], N_recorder);
    Py_XDECREF(now);
    if (!now) return -1;
    return now == recorder && its(its(attributes, N_on), part) == Py_True &&
           its(PyModule_GetDict(parts[P_compiler]), N__is_compiling_flag) == Py_False;
}

/* Call a method of `here` that takes and gives nothing, whatever error is set. */
static void tell(int name) {
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *method = get(parts[P_here], name);
    PyObject *done = method ? PyObject_CallNoArgs(method) : NULL;
    Py_XDECREF(method), Py_XDECREF(done);
    PyErr_Clear();
    PyErr_Restore(type, error, traceback);
}

/* An error that is ours: the tracer's fault. An interrupt, which is no Exception, is the user's. */
static int fault(PyObject *recorder, int part) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "an attribute is missing");
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback) PyException_SetTraceback(error, traceback);
    PyObject *done = PyObject_CallMethodObjArgs(recorder, names[N_fault], names[part], error, NULL);
    Py_XDECREF(type), Py_XDECREF(error), Py_XDECREF(traceback), Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Forget an error after which Python takes over: it meets it again, and knows what to do. 0 if that
   is so, -1 if it is the user's. */
static int forget(void) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    return 0;
}

/* What is to be done about a call of torch's: nothing, `passed` or `turn`. */
typedef struct {
    PyObject *recorder, *attributes, *place, *passed, *turn;
} Op;

/* Where a frame calls a function of torch's of this name, as `Places.find`; NULL if it was not
   there before, or another function of the user's was met last. */
static PyObject *place_of(PyObject *places, PyObject *name, PyObject *frame) {
    PyObject *last = places ? get(places, N__last) : NULL;
    PyObject *code = get(frame, N_f_code), *key = NULL, *place = NULL;
    if (code && last && PyTuple_Check(last) && PyTuple_GetItem(last, 0) == code) {
        PyObject *around = get(frame, N_f_back), *at = get(frame, N_f_lasti);
        PyObject *from = around && around != Py_None ? get(around, N_f_lasti) : owned(around);
        if (at && from) key = PyTuple_Pack(3, name, at, from);
        Py_XDECREF(around), Py_XDECREF(at), Py_XDECREF(from);
        if (key) place = owned(find(PyTuple_GetItem(last, 1), key));
    }
    Py_XDECREF(last), Py_XDECREF(code), Py_XDECREF(key);
    return place;
}

/* Whether a call may be passed over, so far as can be known without counting it. */
static int may_pass(Op *op, PyObject *here, PyObject *keywords) {
    PyObject *stack = its(here, N_stack), *line = its(here, N_line);
    if (!is_a(op->place, PLACE) || ((Place *)op->place)->outline == Py_None) return 0;
    if (keywords != Py_None && PyDict_Size(keywords) &&
        (its(keywords, N_out) || its(keywords, N_inplace)))
        return 0;
    PyObject *rules = its(op->attributes, N_rules);
    PyObject *stepped = rules ? get(rules, N_stepped) : NULL;
    Py_XDECREF(stepped); /* True and False live on */
    return stack && PyList_Check(stack) && !PyList_Size(stack) && line &&
           (line == Py_None || is_a(line, FRAME)) && stepped == Py_False &&
           number(its(op->attributes, N_step)) == number(((Place *)op->place)->step);
}

/* As `Place.takes`, of one that has something to compare with and has run in this step. -1 with an
   error set. */
static int takes(Place *place, PyObject *around) {
    Frame *line = around == Py_None ? NULL : (Frame *)around;
    long long turn = number(place->turns);
    if (line && number(place->line) != number(line->began)) {
        if (put(&place->line, owned(line->began)) < 0) return -1;
        turn = 0;
    }
    if (put_number(&place->runs, number(place->runs) + 1) || put_number(&place->turns, turn + 1))
        return -1;
    return (!line || line->recorded == Py_True) && is_taken(turn);
}

/* Count a call that is passed over. */
static int pass(Op *op, PyObject *seen) {
    PyObject *node = PyObject_CallNoArgs(parts[P_next_node]);
    PyObject *now = PyObject_CallNoArgs(parts[P_clock]);
    PyObject *seq = owned(its(op->attributes, N_seq));
    if (node && now && seq && !add_one(op->attributes, N_seq) && !add_one(op->attributes, N_plain))
        op->passed = PyTuple_Pack(6, op->recorder, seen, op->place, seq, node, now);
    Py_XDECREF(node), Py_XDECREF(now), Py_XDECREF(seq);
    return op->passed ? 1 : -1;
}

/* What `ops._turn` decides of a call that may be passed over. 1 if it has decided, 0 if Python is
   to, -1 with an error set after it was counted. */
static int decide(Op *op, PyObject *here, PyObject *function, PyObject *keywords, PyObject *frame) {
    PyObject *name = get(function, N___name__), *seen = NULL;
    int done = 0;
    if (name && PyUnicode_CheckExact(name))
        seen = PyObject_CallFunctionObjArgs(parts[P_op_of], name, NULL);
    if (seen && seen != Py_None && its(op->attributes, N_replaying) == Py_False)
        op->place = place_of(its(op->attributes, N_places), name, frame);
    if (op->place && may_pass(op, here, keywords) && !PyErr_Occurred()) {
        int taken = takes((Place *)op->place, its(here, N_line));
        if (taken == 0) done = pass(op, seen);
        if (taken == 1)
            op->turn = PyObject_CallFunctionObjArgs(parts[P_turn], op->recorder, name, seen,
                                                    op->place, NULL);
        if (taken) done = op->turn ? 1 : -1;
    }
    Py_XDECREF(name), Py_XDECREF(seen);
    return done;
}

/* Let Python decide, while its trace function rests. 0, or -1 with an error set. */
static int ask_python(Op *op, PyObject *function, PyObject *keywords, PyObject *frame) {
    tell(N_rest);
    PyObject *turn = PyObject_CallFunctionObjArgs(parts[P_decide], function, keywords, frame, NULL);
    tell(N_go_on);
    if (!turn) return -1;
    if (turn == Py_None) Py_DECREF(turn);
    else if ((PyObject *)Py_TYPE(turn) == parts[P_turn]) op->turn = turn;
    else op->passed = turn;
    return 0;
}

/* Fills in what is to be done. 0, or -1 with an error set. */
static int begin(Op *op, PyObject *function, PyObject *keywords, PyObject *frame) {
    PyObject *here = get(parts[P_here], N___dict__), *state = NULL;
    int done = 0;
    op->recorder = get(parts[P_slot], N_recorder);
    if (op->recorder && op->recorder != Py_None && number(its(here, N_busy)) == 0) {
        op->attributes = PyObject_GenericGetDict(op->recorder, NULL);
        if (its(op->attributes, N_thins_ops) == Py_True &&
            is_at_work(op->recorder, op->attributes, N_ops) == 1)
            state = PyObject_CallNoArgs(parts[P_tracing_state]);
        if (state == Py_None) done = decide(op, here, function, keywords, frame);
    }
    Py_XDECREF(here), Py_XDECREF(state);
    if (done < 0) return fault(op->recorder, N_ops);
    if (done) return 0;
    return forget() < 0 ? -1 : ask_python(op, function, keywords, frame);
}

/* As `ops._has_news` where there is none, of one plain tensor: 1 if that is so, 0 if Python has to
   look, -1 with an error set. */
static int is_quiet(Place *place, PyObject *result) {
    if (!place->shape || place->shape == Py_None || place->is_bad != Py_False) return 0;
    PyObject *shape = owned(place->shape), *dtype = owned(place->dtype), *quiet = NULL;
    /* torch puts a mode of its own below ours */
    PyObject *count = PyObject_CallNoArgs(parts[P_mode_count]);
    if (count && PyLong_AsLong(count) == 0)
        quiet = PyObject_CallFunctionObjArgs(parts[P_is_quiet], result, shape, dtype, NULL);
    Py_XDECREF(shape), Py_XDECREF(dtype), Py_XDECREF(count), Py_XDECREF(quiet);
    return PyErr_Occurred() ? -1 : quiet == Py_True;
}

/* Keep what an op made that is passed over, for whoever meets it. */
static int keep(PyObject *passed, PyObject *result) {
    PyObject *attributes = PyObject_GenericGetDict(PyTuple_GetItem(passed, 0), NULL);
    PyObject *table = owned(its(attributes, N_tensors)),
             *made = table ? get(table, N_passed) : NULL;
    PyObject *ref = PyWeakref_NewRef(result, NULL), *key = PyLong_FromVoidPtr(result);
    PyObject *what = PyTuple_Pack(2, passed, Py_None), *most = NULL, *cleaned = NULL;
    PyObject *kept = ref && what ? PyTuple_Pack(3, ref, parts[P_is_met], what) : NULL;
    if (made && key && kept && !PyDict_SetItem(made, key, kept) &&
        !add_one(attributes, N_passed_over))
        most = get(table, N_most_passed);
    if (most && PyDict_Size(made) > PyLong_AsLongLong(most))
        cleaned = PyObject_CallMethodObjArgs(table, names[N_forget_passed], NULL);
    Py_XDECREF(attributes), Py_XDECREF(table), Py_XDECREF(made), Py_XDECREF(ref), Py_XDECREF(key);
    Py_XDECREF(what), Py_XDECREF(kept), Py_XDECREF(most), Py_XDECREF(cleaned);
    return PyErr_Occurred() ? -1 : 0;
}

/* Record an op that has run after all. */
static PyObject *late(int what, PyObject *passed, PyObject *arguments, PyObject *keywords,
                      PyObject *result) {
    PyObject *given = keywords == Py_None ? PyDict_New() : owned(keywords);
    PyObject *done = NULL;
    if (given)
        done = PyObject_CallFunctionObjArgs(parts[what], passed, arguments, given, result, NULL);
    Py_XDECREF(given);
    return done;
}

/* After an op that was to be passed over and has run. 0, or -1 with an error set. */
static int end(PyObject *passed, PyObject *arguments, PyObject *keywords, PyObject *result) {
    PyObject *place = PyTuple_GetItem(passed, 2);
    int quiet = 0;
    if ((PyObject *)Py_TYPE(result) == parts[P_tensor] && is_a(place, PLACE))
        quiet = is_quiet((Place *)place, result);
    if (quiet == 1 && keep(passed, result) < 0) quiet = -1;
    if (quiet < 0) return fault(PyTuple_GetItem(passed, 0), N_ops);
    if (quiet) return 0;
    tell(N_rest);
    PyObject *news = PyObject_CallFunctionObjArgs(parts[P_has_news], passed, result, NULL);
    tell(N_go_on);
    int has_news = news ? PyObject_IsTrue(news) : -1;
    Py_XDECREF(news);
    if (has_news <= 0) return has_news;
    PyObject *done = late(P_record_late, passed, arguments, keywords, result);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* After an op that has raised: its error stays set. */
static void end_raised(PyObject *passed, PyObject *arguments, PyObject *keywords) {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return;
    PyObject *type, *error, *traceback, *new_type, *new_error, *new_traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback) PyException_SetTraceback(error, traceback);
    PyObject *done = late(P_raise_late, passed, arguments, keywords, error);
    if (done) {
        Py_DECREF(done);
        PyErr_Restore(type, error, traceback);
        return;
    }
    PyErr_Fetch(&new_type, &new_error, &new_traceback);
    PyErr_NormalizeException(&new_type, &new_error, &new_traceback);
    PyException_SetContext(new_error, error); /* which takes it */
    Py_XDECREF(type), Py_XDECREF(traceback);
    PyErr_Restore(new_type, new_error, new_traceback);
}

static PyObject *run(PyObject *passed, PyObject *function, PyObject *arguments,
                     PyObject *keywords) {
    PyObject *result = PyObject_Call(function, arguments, keywords == Py_None ? NULL : keywords);
    if (!passed) return result;
    if (!result) end_raised(passed, arguments, keywords);
    else if (end(passed, arguments, keywords, result) < 0) Py_CLEAR(result);
    return result;
}

static PyObject *call(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!parts[P_slot] || nargs != 4 || !PyTuple_Check(args[1]) ||
        (args[2] != Py_None && !PyDict_Check(args[2]))) {
        PyErr_SetString(PyExc_TypeError, "call(function, tuple, dict or None, frame)");
        return NULL;
    }
    Op op = {NULL, NULL, NULL, NULL, NULL};
    PyObject *result = NULL;
    if (begin(&op, args[0], args[2], args[3]) == 0)
        result = op.turn ? owned(op.turn) : run(op.passed, args[0], args[1], args[2]);
    Py_XDECREF(op.recorder), Py_XDECREF(op.attributes), Py_XDECREF(op.place);
    Py_XDECREF(op.passed), Py_XDECREF(op.turn);
    return result;
}

/* Whether the line that ends in a frame was passed over, and a look at it can wait, so far as the
   frame knows: a part of `FrameTrace.event` and `FrameTrace._may_wait`. */
static int is_passing(Frame *f) {
    if (f->recorded != Py_False || f->has_news != Py_False || f->goes_on != Py_False) return 0;
    if (number(f->line) <= 0 || f->theirs != Py_None || !f->began || !f->nth) return 0;
    return is_a(f->deferred, DEFERRED) && is_a(f->thinning, THINNING) && f->variables &&
           f->recorder && f->tracer;
}

/* The rest of it: nothing but plain ops happened in the line. -1 with an error set. */
static int may_wait(Frame *f, PyObject *attributes, PyObject *tracers) {
    PyObject *containers = get(f->variables, N_has_containers);
    Py_XDECREF(containers);
    if (containers != Py_False) return 0;
    PyObject *seq = its(attributes, N_seq), *plain = its(attributes, N_plain);
    if (its(attributes, N_full) != Py_True || number(its(attributes, N_step)) != number(f->step) ||
        !seq || !plain || number(seq) - number(plain) != number(f->undisturbed) ||
        number(its(tracers, N_closures)) != number(f->closures))
        return 0;
    PyObject *here = get(parts[P_here], N___dict__);
    int ours = number(its(here, N_busy)) != 0;
    Py_XDECREF(here);
    return !ours && is_at_work(f->recorder, attributes, N_lines) == 1;
}

/* As `Deferred.add`, and forget that more than plain ops happened in the line that ended. Whether
   those that wait have to be looked at now; -1 with an error set. */
static int put_off(Deferred *d, PyObject *ended, PyObject *execution, PyObject *begun) {
    PyObject *stored = find(d->stores, ended), *next = find(d->stores, begun);
    PyObject *pair = PyTuple_Pack(2, stored ? stored : parts[P_no_names], execution);
    PyObject *done = NULL, *apart = NULL;
    int due = -1;
    if (pair && PyDict_SetItem(d->lines, ended, pair) == 0) {
        if (stored) done = PyObject_CallMethodObjArgs(d->names, names[N_update], stored, NULL);
        due = PyDict_Contains(d->lines, begun);
        if (due == 0) due = PySet_Contains(d->disturbed, begun);
        if (due == 0 && next) {
            apart = PyObject_CallMethodObjArgs(d->names, names[N_isdisjoint], next, NULL);
            due = apart == Py_False;
        }
        if (PySet_Size(d->disturbed)) PySet_Discard(d->disturbed, ended);
    }
    Py_XDECREF(done), Py_XDECREF(apart), Py_XDECREF(pair);
    return PyErr_Occurred() ? -1 : due;
}

/* As `Thinning.begin`: which execution of its line this is, from 0. With an error set if it
   fails. */
static long long count(Frame *f, PyObject *line, PyObject *frame) {
    Thinning *thinning = (Thinning *)f->thinning;
    PyObject *next = NULL;
    long long nth = -1;
    int special = PySet_Contains(thinning->special, line);
    if (special == 1) {
        PyObject *found =
            PyObject_CallMethodObjArgs(f->thinning, names[N_begin], line, f->last, frame, NULL);
        if (found) nth = PyLong_AsLongLong(found);
        Py_XDECREF(found);
    } else if (special == 0 && !put(&thinning->statement, owned(zero)) &&
               !put(&thinning->leaving, owned(zero)) && !put(&thinning->again, owned(Py_False))) {
        PyObject *known = find(thinning->counts, line); /* borrowed */
        nth = known ? PyLong_AsLongLong(known) : 0;
        next = PyLong_FromLongLong(nth + 1);
        if (next) PyDict_SetItem(thinning->counts, line, next);
    }
    Py_XDECREF(next);
    return nth;
}

/* As `version_of`. */
static PyObject *version_of(PyObject *tensor) {
    PyObject *version = get(tensor, N__version);
    if (version || !PyErr_ExceptionMatches(PyExc_RuntimeError)) return version;
    PyErr_Clear(); /* inference tensors do not track versions */
    return owned(zero);
}

/* Whether a tensor is the one that is held, and unchanged: `Reader.is_same`. */
static int is_same(PyObject *held, PyObject *tensor, PyObject *address, PyObject *version) {
    PyObject *then = get(held, N_address), *kept = get(held, N_version), *ref = get(held, N_ref);
    int same = then && kept && ref ? PyObject_RichCompareBool(address, then, Py_EQ) : -1;
    if (same == 1) same = PyWeakref_GetObject(ref) == tensor; /* borrowed */
    if (same == 1) same = PyObject_RichCompareBool(version, kept, Py_EQ);
    Py_XDECREF(then), Py_XDECREF(kept), Py_XDECREF(ref);
    return same;
}

/* Whether a line stored a tensor of this shape the last time, too; as `Thinning.reshapes`. */
static int has_shape(Thinning *thinning, PyObject *line, PyObject *name, PyObject *tensor) {
    PyObject *shape = get(tensor, N_shape), *key = PyTuple_Pack(2, line, name);
    PyObject *before = shape ? owned(find(thinning->shapes, key)) : NULL;
    int same = before ? PyObject_RichCompareBool(before, shape, Py_EQ) : 0;
    Py_XDECREF(shape), Py_XDECREF(key), Py_XDECREF(before);
    return same;
}

/* What is found of a variable: ANOTHER, with nothing done, is for Python to look at. */
enum { SAME, CHANGED, ANOTHER };

/* Look at a variable that is a tensor, and was one. */
static int look_at_tensor(Thinning *thinning, PyObject *line, PyObject *name, PyObject *held,
                          PyObject *tensor) {
    PyObject *address = PyLong_FromVoidPtr(tensor), *version = version_of(tensor), *ref = NULL;
    int same = address && version ? is_same(held, tensor, address, version) : -1, found = SAME;
    if (same == 0) found = has_shape(thinning, line, name, tensor) == 1 ? CHANGED : ANOTHER;
    if (found == CHANGED && (ref = PyWeakref_NewRef(tensor, NULL)) != NULL &&
        !set(held, N_address, address) && !set(held, N_version, version))
        set(held, N_ref, ref);
    Py_XDECREF(address), Py_XDECREF(version), Py_XDECREF(ref);
    return PyErr_Occurred() ? -1 : found;
}

/* As `Variables.look_at`, of the one name that a line stores: whole numbers, and tensors of the
   shape that the line has stored before. */
static int look_at(PyObject *known, Thinning *thinning, PyObject *found, PyObject *line,
                   PyObject *name, PyObject *old) {
    PyObject *value =
        PyDict_Check(found) ? owned(find(found, name)) : PyObject_GetItem(found, name);
    int change = ANOTHER;
    if (!value) {
        PyErr_Clear(); /* it was deleted */
    } else if (old == value) {
        change = SAME;
    } else if (PyLong_CheckExact(value) && PyLong_CheckExact(old)) {
        change = PyObject_RichCompareBool(value, old, Py_EQ) == 1 ? SAME : CHANGED;
        if (PyDict_SetItem(known, name, value) < 0) change = -1;
    } else if ((PyObject *)Py_TYPE(value) == parts[P_tensor] &&
               (PyObject *)Py_TYPE(old) == parts[P_held]) {
        PyObject *ref = get(old, N_ref);
        if (ref && ref != Py_None) change = look_at_tensor(thinning, line, name, old, value);
        Py_XDECREF(ref);
    }
    Py_XDECREF(value);
    return change;
}

/* As `Thinning.pass_over`, of a line that was passed over before. 0, or -1 with an error set. */
static int pass_over(Thinning *thinning, Passed *passed, PyObject *line, PyObject *execution,
                     PyObject *name, PyObject *old) {
    PyObject *seq = PyTuple_GetItem(execution, 0), *nth = PyTuple_GetItem(execution, 1);
    int quiet = number(PyTuple_GetItem(execution, 3)) == number(seq) + 1;
    long long times = number(passed->count);
    if ((number(nth) != number(passed->nth) || !times) && put_number(&passed->count, times + 1))
        return -1;
    if (name || !quiet || !number(passed->seq)) put(&passed->seq, owned(seq));
    put(&passed->nth, owned(nth));
    put(&passed->host_ns, owned(PyTuple_GetItem(execution, 2)));
    PyObject *before = name ? owned(find(thinning->owed, name)) : NULL, *pair = NULL;
    PyObject *by = before ? PyTuple_GetItem(before, 0) : NULL;
    if (name && !(by && PyObject_RichCompareBool(by, line, Py_EQ) == 1)) {
        pair = PyTuple_Pack(2, line, before ? PyTuple_GetItem(before, 1) : old);
        if (pair) PyDict_SetItem(thinning->owed, name, pair);
    }
    Py_XDECREF(before), Py_XDECREF(pair);
    return PyErr_Occurred() ? -1 : 0;
}

/* The only one of some names, or NULL. */
static PyObject *only(PyObject *stored) {
    PyObject *all = PySet_Size(stored) == 1 ? PyObject_GetIter(stored) : NULL;
    PyObject *name = all ? PyIter_Next(all) : NULL;
    Py_XDECREF(all);
    return name;
}

/* Look at a line that waits, as `FrameTrace.look_back_at`. 1, 0 if Python has to, or -1 with an
   error set. */
static int look_back_at(Frame *f, PyObject *found, PyObject *line, PyObject *stored,
                        PyObject *execution) {
    Thinning *thinning = (Thinning *)f->thinning;
    PyObject *passed = owned(find(thinning->passed, line)), *known = get(f->variables, N_known);
    PyObject *name = only(stored), *old = owned(find(known, name));
    int change = ANOTHER;
    if (is_a(passed, PASSED)) {
        if (!PySet_Size(stored)) change = SAME;
        else if (old) change = look_at(known, thinning, found, line, name, old);
        if (change == SAME || change == CHANGED)
            pass_over(thinning, (Passed *)passed, line, execution, change == CHANGED ? name : NULL,
                      old);
    }
    Py_XDECREF(passed), Py_XDECREF(known), Py_XDECREF(name), Py_XDECREF(old);
    return PyErr_Occurred() ? -1 : change != ANOTHER;
}

/* Look at all lines that wait, as `FrameTrace._catch_up`. 0, or -1 with an error set. */
static int catch_up(Frame *f, PyObject *frame) {
    Deferred *deferred = (Deferred *)f->deferred;
    PyObject *waiting = deferred->lines, *line, *one, *told, *found = get(frame, N_f_locals);
    PyObject *none = PyDict_New();
    Py_ssize_t at = 0;
    int done = found && none && PySet_Clear(deferred->names) == 0 ? 1 : -1;
    if (none) deferred->lines = none; /* nobody else has those that wait now */
    else Py_INCREF(waiting);
    while (done >= 0 && PyDict_Next(waiting, &at, &line, &one)) {
        PyObject *stored = PyTuple_GetItem(one, 0), *execution = PyTuple_GetItem(one, 1);
        done = look_back_at(f, found, line, stored, execution);
        if (done == 0) {
            told = PyObject_CallMethodObjArgs((PyObject *)f, names[N_look_back_at], frame, found,
                                              line, stored, execution, NULL);
            done = told ? 1 : -1;
            Py_XDECREF(told);
        }
    }
    Py_XDECREF(waiting), Py_XDECREF(found);
    return done < 0 ? -1 : 0;
}

/* Leave a block that was entered, whatever error is set. */
static void leave(PyObject *guard) {
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *done =
        PyObject_CallMethodObjArgs(guard, names[N___exit__], Py_None, Py_None, Py_None, NULL);
    Py_XDECREF(done);
    PyErr_Clear();
    PyErr_Restore(type, error, traceback);
}

/* The same as our own code, of which nothing is recorded, and let ops know whose line begins. */
static int look_back(Frame *f, PyObject *frame) {
    PyObject *here = get(parts[P_here], N___dict__), *guard = PyObject_CallNoArgs(parts[P_guard]);
    PyObject *in = guard ? PyObject_CallMethodObjArgs(guard, names[N___enter__], NULL) : NULL;
    int done = -1;
    if (here && in && set_number(here, N_busy, 1) == 0) {
        done = catch_up(f, frame);
        PyObject *type, *error, *traceback;
        PyErr_Fetch(&type, &error, &traceback);
        PyDict_SetItem(here, names[N_line], (PyObject *)f);
        PyDict_SetItem(here, names[N_busy], zero);
        PyErr_Restore(type, error, traceback);
    }
    if (in) leave(guard);
    Py_XDECREF(here), Py_XDECREF(guard), Py_XDECREF(in);
    if (done == 0) { /* Python writes them back: as they are now */
        PyObject *found = get(frame, N_f_locals);
        if (!found) done = -1;
        Py_XDECREF(found);
    }
    return done;
}

/* Begin a line that is passed over: `FrameTrace._begin`. 0, or -1 with an error set. */
static int begin_line(Frame *f, PyObject *attributes, PyObject *tracers, PyObject *line,
                      long long turn) {
    PyObject *seq = its(attributes, N_seq);
    long long others = number(seq) + 1 - number(its(attributes, N_plain));
    if (put(&f->line, owned(line)) || put(&f->last, owned(line)) || put_number(&f->nth, turn) ||
        put(&f->has_news, owned(Py_False)) || put(&f->began, owned(seq)) ||
        put_number(&f->undisturbed, others) || put(&f->closures, owned(its(tracers, N_closures))))
        return -1;
    return add_one(attributes, N_seq);
}

/* Put off the look at the line that ends, and begin the next one: `FrameTrace._defer`. 0, or -1
   with an error set. */
static int defer(Frame *f, PyObject *attributes, PyObject *tracers, PyObject *frame) {
    PyObject *now = PyObject_CallNoArgs(parts[P_clock]), *line = get(frame, N_f_lineno);
    PyObject *took = now ? PyLong_FromLongLong(number(now) - number(f->since)) : NULL;
    PyObject *seq = owned(its(attributes, N_seq)), *last = owned(f->line);
    PyObject *execution = NULL, *done = NULL;
    if (line && took && seq) execution = PyTuple_Pack(4, f->began, f->nth, took, seq);
    int due = execution ? put_off((Deferred *)f->deferred, last, execution, line) : -1;
    long long turn = due < 0 ? -1 : count(f, line, frame);
    put_number(&f->raised_at, -1);
    if (!PyErr_Occurred() && is_taken(turn)) {
        PyObject *which = PyLong_FromLongLong(turn);
        if (which)
            done = PyObject_CallMethodObjArgs((PyObject *)f, names[N_look_back], frame, line, which,
                                              now, NULL);
        Py_XDECREF(which);
    } else if (!PyErr_Occurred() && (!due || look_back(f, frame) == 0)) {
        put(&f->since, owned(now));
        begin_line(f, attributes, tracers, line, turn);
    }
    Py_XDECREF(now), Py_XDECREF(line), Py_XDECREF(took), Py_XDECREF(seq), Py_XDECREF(last);
    Py_XDECREF(execution), Py_XDECREF(done);
    return PyErr_Occurred() ? -1 : 0;
}

/* 1 if a line was passed over, 0 if it is Python's, -1 with an error set. */
static int pass_line(Frame *f, PyObject *frame) {
    if (!is_passing(f)) return 0;
    PyObject *attributes = PyObject_GenericGetDict(f->recorder, NULL);
    PyObject *tracers = PyObject_GenericGetDict(f->tracer, NULL);
    int waits = attributes && tracers ? may_wait(f, attributes, tracers) : 0;
    if (!waits) waits = forget();
    else if (defer(f, attributes, tracers, frame) < 0) waits = fault(f->recorder, N_lines);
    Py_XDECREF(attributes), Py_XDECREF(tracers);
    return waits;
}

/* A frame's trace function: `FrameTrace.event`. */
static PyObject *follow(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!parts[P_slot] || nargs != 4 || !is_a(args[0], FRAME)) {
        PyErr_SetString(PyExc_TypeError, "follow(trace, frame, event, arg)");
        return NULL;
    }
    Frame *f = (Frame *)args[0];
    int passed = args[2] == names[N_line] ? pass_line(f, args[1]) : 0;
    if (passed < 0) return NULL;
    if (passed) return owned(f->local);
    return PyObject_CallMethodObjArgs(args[0], names[N_event], args[1], args[2], args[3], NULL);
}

/* Python's trace function, of functions whose lines nobody asks for: `LineTracer._on_call`. */
static PyObject *met(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "met(tracer, frame, event, arg)");
        return NULL;
    }
    PyObject *attributes = PyObject_GenericGetDict(args[0], NULL), *code = get(args[1], N_f_code);
    PyObject *flags = code ? get(code, N_co_flags) : NULL,
             *name = code ? get(code, N_co_name) : NULL;
    PyObject *known = its(attributes, N__names); /* borrowed */
    int ours = 1;
    if (flags && name && known && its(attributes, N__is_alone) == Py_True &&
        !(PyLong_AsLong(flags) & NESTED))
        ours = PySet_Contains(known, name);
    Py_XDECREF(attributes), Py_XDECREF(code), Py_XDECREF(flags), Py_XDECREF(name);
    if (ours == 0) return owned(Py_None);
    if (forget() < 0) return NULL;
    return PyObject_CallMethodObjArgs(args[0], names[N__on_call], args[1], args[2], args[3], NULL);
}

static PyObject *prepare(PyObject *module, PyObject *told) {
    (void)module;
    for (int i = 0; i < PARTS; i++) {
        PyObject *one = PyDict_Check(told) ? PyDict_GetItemString(told, TOLD[i]) : NULL;
        if (!one) {
            PyErr_Format(PyExc_TypeError, "not told of %s", TOLD[i]);
            return NULL;
        }
        PyObject *before = parts[i];
        parts[i] = owned(one);
        Py_XDECREF(before);
    }
    return owned(Py_None);
}

static int start(PyObject *module) {
    for (int i = 0; i < NAMES; i++)
        if (!names[i] && !(names[i] = PyUnicode_InternFromString(TEXTS[i]))) return -1;
    if (!zero && !(zero = PyLong_FromLong(0))) return -1;
    for (int i = 0; i < STATES; i++) {
        PyType_Slot slots[] = {{Py_tp_members, KINDS[i].members},
                               {Py_tp_traverse, (void *)traverse},
                               {Py_tp_clear, (void *)clear},
                               {Py_tp_dealloc, (void *)dealloc},
                               {0, NULL}};
        PyType_Spec spec = {KINDS[i].name, KINDS[i].size, 0,
                            Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
        if (!states[i] && !(states[i] = (PyTypeObject *)PyType_FromSpec(&spec))) return -1;
        Py_INCREF(states[i]);
        if (PyModule_AddObject(module, KINDS[i].name + sizeof(HOME) - 1, (PyObject *)states[i]) < 0)
            return -1;
    }
    /* Raised with ALL_PARTS and the members: one built from other sources is not used. */
    return PyModule_AddIntConstant(module, "FORM", 2);
}

PyDoc_STRVAR(prepare_doc,
             "Tell what the others use, by name: functions and classes of ours and torch's.");
PyDoc_STRVAR(call_doc,
             "Call a function of torch's, unless more than that is to be done: then what.");
PyDoc_STRVAR(follow_doc,
             "The trace function of a frame, which asks `event` of what is not passed over.");
PyDoc_STRVAR(met_doc,
             "The trace function of a thread, which asks `_on_call` of functions it follows.");

static PyMethodDef methods[] = {
    {"prepare", prepare, METH_O, prepare_doc},
    {"call", (PyCFunction)(void (*)(void))call, METH_FASTCALL, call_doc},
    {"follow", (PyCFunction)(void (*)(void))follow, METH_FASTCALL, follow_doc},
    {"met", (PyCFunction)(void (*)(void))met, METH_FASTCALL, met_doc},
    {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)start}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_turns", "What is done at ops and lines that are passed over.", 0,
    methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__turns(void) { return PyModuleDef_Init(&definition); }
