/* A stand-in for NCCL and for CUDA's streams, for tests on machines without a device. It is neither.
 *
 * It has the functions that the lane `direct` calls, with NCCL's meaning as far as that can be had without a device:
 * communicators of two ranks, joined in the background; groups whose sends and receives go on at once, in order for
 * each direction, without tags; streams that do one group after the other in a thread of their own; a group that
 * spins until its communicator is aborted when the other rank is gone. Rows are in host memory and go over TCP.
 *
 * What no caller may do ends the process. STANDIN_FAULT chooses what goes wrong:
 *   never-joins    a communicator stays in progress
 *   silent         a rank that is gone is not reported, as between two GPUs of one host
 *   send-fails     the third send of a process is refused
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7, NOT_READY = 600 };
enum { MOST = 64, MOST_BYTES = 64 << 20 };

typedef struct { char internal[128]; } unique_id;
typedef struct { int port; int listener; } place;
typedef struct { char *address; size_t nbytes; } piece;

typedef struct comm {
    int rank, fd;
    place where;
    atomic_int state, aborted, settling, jobs;
    pthread_t joiner;
} comm;

typedef struct job {
    comm *comm;
    piece pieces[2][MOST];
    int count[2];
    struct job *next;
} job;

typedef struct stream {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t more;
    job *first, *last;
    int pending, ended;
} stream;

static _Thread_local int device = -1, depth;
static _Thread_local job *group;
static _Thread_local stream *group_stream;
static atomic_int sends_made;

static void never(const char *what) {
    fprintf(stderr, "stand-in: %s\n", what);
    abort();
}

static int fault(const char *name) {
    const char *chosen = getenv("STANDIN_FAULT");
    return chosen && !strcmp(chosen, name);
}

/* -- communicators */

int ncclGetVersion(int *version) { *version = 22703; return SUCCESS; }
const char *ncclGetErrorString(int code) { return code == REMOTE_ERROR ? "the other rank is gone" : "it was refused"; }
const char *ncclGetLastError(void *comm) { (void)comm; return "the stand-in says so"; }

int ncclGetUniqueId(unique_id *id) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    place where = {.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (bind(where.listener, (void *)&address, length) || listen(where.listener, 1)) never("no port");
    getsockname(where.listener, (void *)&address, &length);
    where.port = address.sin_port;
    memset(id, 0, sizeof *id);
    memcpy(id, &where, sizeof where);
    return SUCCESS;
}

static void *join(void *argument) {
    comm *c = argument;
    while (fault("never-joins") && !c->aborted) usleep(1000);
    while (!c->aborted && c->fd < 0) {
        if (c->rank == 0) {
            struct pollfd p = {.fd = c->where.listener, .events = POLLIN};
            if (poll(&p, 1, 10) > 0) c->fd = accept4(c->where.listener, NULL, NULL, SOCK_CLOEXEC);
            continue;
        }
        struct sockaddr_in address = {
            .sin_family = AF_INET, .sin_port = c->where.port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (!connect(fd, (void *)&address, sizeof address)) { c->fd = fd; break; }
        close(fd);
        c->state = REMOTE_ERROR;
        return NULL;
    }
    if (c->aborted) return NULL;
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->state = SUCCESS;
    return NULL;
}

typedef struct { size_t size; unsigned magic, version; int blocking; } config_head;

int ncclCommInitRankConfig(comm **out, int ranks, unique_id id, int rank, config_head *config) {
    if (device < 0) never("the thread has no device");
    if (ranks != 2 || rank < 0 || rank > 1) never("it has communicators of two ranks only");
    if (config->magic != 0xcafebeef || config->blocking) never("the configuration is not one of a call that does not wait");
    comm *c = calloc(1, sizeof *c);
    c->rank = rank;
    c->fd = -1;
    memcpy(&c->where, &id, sizeof c->where);
    c->state = IN_PROGRESS;
    pthread_create(&c->joiner, NULL, join, c);
    *out = c;
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(comm *c, int *code) {
    *code = c->settling ? IN_PROGRESS : c->state;
    c->settling = 0;
    return SUCCESS;
}

int ncclCommAbort(comm *c) {
    c->aborted = 1;
    pthread_join(c->joiner, NULL);
    while (c->jobs) usleep(500);
    if (c->fd >= 0) close(c->fd);
    if (c->rank == 0) close(c->where.listener);
    free(c);
    return SUCCESS;
}

/* -- groups */

int ncclGroupStart(void) {
    if (depth++) never("a group in a group");
    return SUCCESS;
}

static int put(int side, const void *address, size_t nbytes, int type, int peer, comm *c, stream *s) {
    if (!depth) never("a move outside of a group");
    if (device < 0) never("the thread has no device");
    if (type != 1 || peer != 1 - c->rank || c->state) never("a move that cannot be");
    if (side == 0 && fault("send-fails") && ++sends_made == 3) return INVALID_USAGE;
    if (!group) group = calloc(1, sizeof *group);
    group->comm = c;
    group_stream = s;
    if (group->count[0] + group->count[1] == MOST) never("a group of too many moves");
    group->pieces[side][group->count[side]++] = (piece){(char *)address, nbytes};
    return SUCCESS;
}

int ncclSend(const void *address, size_t nbytes, int type, int peer, comm *c, stream *s) {
    return put(0, address, nbytes, type, peer, c, s);
}

int ncclRecv(void *address, size_t nbytes, int type, int peer, comm *c, stream *s) {
    return put(1, address, nbytes, type, peer, c, s);
}

int ncclGroupEnd(void) {
    if (!depth--) never("the end of a group that was not started");
    if (!group) return SUCCESS;
    job *j = group;
    stream *s = group_stream;
    size_t total = 0;
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < j->count[side]; i++) total += j->pieces[side][i].nbytes;
    if (total > MOST_BYTES && j->count[0] + j->count[1] > 1) never("a group of too many bytes");
    group = NULL;
    j->comm->jobs++;
    j->comm->settling = 1;
    pthread_mutex_lock(&s->lock);
    if (s->last) s->last->next = j; else s->first = j;
    s->last = j;
    s->pending++;
    pthread_cond_signal(&s->more);
    pthread_mutex_unlock(&s->lock);
    return IN_PROGRESS;
}

/* -- streams */

typedef struct { int at, head; size_t done; uint64_t length; } progress;

/* A little of one direction; whether it may go on, or -1 if the other rank is gone. */
static int advance(job *j, int side, progress *p) {
    if (p->at == j->count[side]) return 0;
    piece *now = &j->pieces[side][p->at];
    char *from = p->head < 8 ? (char *)&p->length + p->head : now->address + p->done;
    size_t left = p->head < 8 ? 8 - (size_t)p->head : now->nbytes - p->done;
    if (side == 0 && p->head == 0) p->length = now->nbytes;
    ssize_t n = left == 0 ? 0 : side == 0 ? send(j->comm->fd, from, left, MSG_NOSIGNAL) : recv(j->comm->fd, from, left, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (n < 0 || (n == 0 && left)) return -1;
    if (p->head < 8) {
        p->head += (int)n;
        if (side == 1 && p->head == 8 && p->length != now->nbytes) never("the two ends of a move are not of one length");
    } else {
        p->done += (size_t)n;
    }
    if (p->head == 8 && p->done == now->nbytes) { p->at++; p->head = 0; p->done = 0; }
    return 1;
}

static void carry(job *j) {
    progress p[2] = {{0}, {0}};
    while (!j->comm->aborted && (p[0].at < j->count[0] || p[1].at < j->count[1])) {
        int sent = advance(j, 0, &p[0]), received = advance(j, 1, &p[1]);
        if (sent < 0 || received < 0) {
            if (!fault("silent")) j->comm->state = REMOTE_ERROR;
            while (!j->comm->aborted) usleep(500); /* as a kernel does */
            break;
        }
        if (sent || received) continue;
        struct pollfd poll_for = {.fd = j->comm->fd};
        if (p[0].at < j->count[0]) poll_for.events |= POLLOUT;
        if (p[1].at < j->count[1]) poll_for.events |= POLLIN;
        poll(&poll_for, 1, 5);
    }
    j->comm->jobs--;
}

static void *work(void *argument) {
    stream *s = argument;
    pthread_mutex_lock(&s->lock);
    while (1) {
        while (!s->first && !s->ended) pthread_cond_wait(&s->more, &s->lock);
        if (!s->first) break;
        job *j = s->first;
        s->first = j->next;
        if (!s->first) s->last = NULL;
        pthread_mutex_unlock(&s->lock);
        carry(j);
        free(j);
        pthread_mutex_lock(&s->lock);
        s->pending--;
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

int cudaSetDevice(int number) { device = number; return SUCCESS; }

int cudaStreamCreateWithFlags(stream **out, unsigned flags) {
    if (device < 0 || flags != 1) never("a stream without a device, or one that waits for the default stream");
    stream *s = calloc(1, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->more, NULL);
    pthread_create(&s->thread, NULL, work, s);
    *out = s;
    return SUCCESS;
}

int cudaStreamQuery(stream *s) {
    pthread_mutex_lock(&s->lock);
    int pending = s->pending;
    pthread_mutex_unlock(&s->lock);
    return pending ? NOT_READY : SUCCESS;
}

int cudaStreamDestroy(stream *s) {
    pthread_mutex_lock(&s->lock);
    if (s->pending) never("a stream is destroyed while something is on it");
    s->ended = 1;
    pthread_cond_signal(&s->more);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    free(s);
    return SUCCESS;
}
