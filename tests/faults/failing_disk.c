/* A disk that fails, for LD_PRELOAD: calls on files below one folder fail as the environment says.

   FAILING_DISK_FOLDER    absolute, without links; without it every call is the system's own
   FAILING_DISK_MATCH     only paths with this text in them (left out: all)
   FAILING_DISK_CALL      open and close (for writing), write, allocate, truncate, map, sync, rename, mkdir, link,
                          remove
   FAILING_DISK_ERRNO     what such a call fails with; 0: it does not fail, it is only slow
   FAILING_DISK_NTH       the first of them that does, counted from 1
   FAILING_DISK_TIMES     how many do from there on; 0: all
   FAILING_DISK_SLEEP_MS  what each of them takes besides
   FAILING_DISK_BYTES     instead of CALL and NTH: a disk with room for so many bytes more, and then ENOSPC
   FAILING_DISK_FREE      what statvfs tells of the room that is left, in bytes
   FAILING_DISK_FD        instead of files below the folder: this descriptor, whatever it is (1: standard output)
   FAILING_DISK_LOG       a file: a line "call path" for every call seen

   What bypasses the C library is not seen: Rust's tempfile, which safetensors uses, renames by a system call of its own.
   A file is known by /proc/self/fd, so that a descriptor that was opened before, copied, or whose file was renamed is
   seen too. A close that fails has closed, and a write that the disk has half room for is short: as on a real one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))next_of(#name))
#define ROOM (2 * PATH_MAX)

static struct {
    const char *folder, *match, *call;
    int error, log, fd;
    long long nth, times, sleep_ms, bytes, free;
} plan;
static long long seen, failed, written;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *next_of(const char *name) { return dlsym(RTLD_NEXT, name); }

static long long number(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text ? atoll(text) : otherwise;
}

/* A process that is forked gets its plan by its own environment, so this waits until there is one. */
static int planned(void) {
    if (plan.folder) return 1;
    const char *folder = getenv("FAILING_DISK_FOLDER");
    if (!folder) return 0;
    pthread_mutex_lock(&lock);
    if (!plan.folder) {
        plan.match = getenv("FAILING_DISK_MATCH");
        plan.call = getenv("FAILING_DISK_CALL");
        plan.error = (int)number("FAILING_DISK_ERRNO", 0);
        plan.nth = number("FAILING_DISK_NTH", 1);
        plan.times = number("FAILING_DISK_TIMES", 0);
        plan.sleep_ms = number("FAILING_DISK_SLEEP_MS", 0);
        plan.bytes = number("FAILING_DISK_BYTES", -1);
        plan.free = number("FAILING_DISK_FREE", -1);
        plan.fd = (int)number("FAILING_DISK_FD", -1);
        const char *log = getenv("FAILING_DISK_LOG");
        plan.log = log ? NEXT(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
        __atomic_store_n(&plan.folder, strdup(folder), __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&lock);
    return 1;
}

static int below(const char *path) {
    size_t length = strlen(plan.folder);
    return !strncmp(path, plan.folder, length) && (path[length] == '/' || !path[length]) &&
           (!plan.match || strstr(path, plan.match));
}

static int path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, ROOM - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path[0] == '/';
}

/* Whether a descriptor is of the disk that fails, and its path. */
static int is_ours(int fd, char *path) {
    if (plan.fd < 0) return path_of_fd(fd, path) && below(path);
    snprintf(path, ROOM, "descriptor %d", fd);
    return fd == plan.fd;
}

static int path_at(int dir, const char *name, char *path) {
    if (!name) return 0;
    if (name[0] == '/') return snprintf(path, ROOM, "%s", name) < ROOM;
    char base[ROOM];
    if (dir == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of_fd(dir, base)) return 0;
    return snprintf(path, ROOM, "%s/%s", base, name) < ROOM;
}

static void pause_ms(long long ms) {
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&left, &left) && errno == EINTR) {}
}

/* Whether a call is one that fails, errno set. */
static int fails(const char *call, const char *path) {
    if (plan.log >= 0) {
        char line[2 * ROOM];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        if (NEXT(write)(plan.log, line, length) < 0) abort();
    }
    if (!plan.call || strcmp(call, plan.call)) return 0;
    long long count = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (count < plan.nth || (plan.times && count >= plan.nth + plan.times)) return 0;
    if (plan.sleep_ms) pause_ms(plan.sleep_ms);
    errno = plan.error;
    return plan.error != 0;
}

static int fd_fails(const char *call, int fd) {
    char path[ROOM];
    int before = errno, answer = planned() && is_ours(fd, path) && fails(call, path);
    if (!answer) errno = before;
    return answer;
}

static int at_fails(const char *call, int dir, const char *name) {
    char path[ROOM];
    int before = errno, answer = planned() && plan.fd < 0 && path_at(dir, name, path) && below(path) && fails(call, path);
    if (!answer) errno = before;
    return answer;
}

/* How many of `wanted` bytes this write may still add; -1, errno set, where it fails. */
static ssize_t room_for(int fd, size_t wanted) {
    char path[ROOM];
    int before = errno;
    if (!planned() || !is_ours(fd, path)) {
        errno = before;
        return (ssize_t)wanted;
    }
    if (fails("write", path)) return -1;
    errno = before;
    if (plan.bytes < 0) return (ssize_t)wanted;
    pthread_mutex_lock(&lock);
    long long room = plan.bytes - written;
    if (room <= 0 && plan.times && failed >= plan.times) room = wanted; /* somebody has made room */
    size_t allowed = room <= 0 ? 0 : (long long)wanted < room ? wanted : (size_t)room;
    if (wanted && !allowed) failed++;
    written += allowed;
    pthread_mutex_unlock(&lock);
    if (wanted && !allowed) {
        errno = ENOSPC;
        return -1;
    }
    return (ssize_t)allowed;
}

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t room = room_for(fd, size);
    return room < 0 ? -1 : NEXT(write)(fd, data, room);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    ssize_t room = room_for(fd, size);
    return room < 0 ? -1 : NEXT(pwrite)(fd, data, room, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    ssize_t room = room_for(fd, size);
    return room < 0 ? -1 : NEXT(pwrite64)(fd, data, room, at);
}

static size_t total(const struct iovec *parts, int count) {
    size_t sum = 0;
    for (int i = 0; i < count; i++) sum += parts[i].iov_len;
    return sum;
}

/* A disk with room for some of it takes a part of the first piece: short, which is what a caller must bear. */
#define VECTOR(call, plain, fd, parts, count)                                                                          \
    size_t wanted = total(parts, count);                                                                               \
    ssize_t room = room_for(fd, wanted);                                                                               \
    if (room < 0) return -1;                                                                                           \
    if ((size_t)room == wanted) return call;                                                                           \
    for (int i = 0; i < count; i++)                                                                                    \
        if (parts[i].iov_len) {                                                                                        \
            size_t size = (size_t)room < parts[i].iov_len ? (size_t)room : parts[i].iov_len;                           \
            return plain;                                                                                              \
        }                                                                                                              \
    return 0;

ssize_t writev(int fd, const struct iovec *parts, int count) {
    VECTOR(NEXT(writev)(fd, parts, count), NEXT(write)(fd, parts[i].iov_base, size), fd, parts, count)
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    VECTOR(NEXT(pwritev)(fd, parts, count, at), NEXT(pwrite)(fd, parts[i].iov_base, size, at), fd, parts, count)
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    VECTOR(NEXT(pwritev64)(fd, parts, count, at), NEXT(pwrite64)(fd, parts[i].iov_base, size, at), fd, parts, count)
}

ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    ssize_t room = room_for(out, size);
    return room < 0 ? -1 : NEXT(sendfile)(out, in, at, room);
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    ssize_t room = room_for(out, size);
    return room < 0 ? -1 : NEXT(sendfile64)(out, in, at, room);
}

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned int flags) {
    ssize_t room = room_for(out, size);
    return room < 0 ? -1 : NEXT(copy_file_range)(in, in_at, out, out_at, room, flags);
}

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))
#define OPENS(name)                                                                                                    \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;                                      \
        va_end(rest);                                                                                                  \
        return WRITES(flags) && at_fails("open", AT_FDCWD, path) ? -1 : NEXT(name)(path, flags, mode);                 \
    }
#define OPENS_AT(name)                                                                                                 \
    int name(int dir, const char *path, int flags, ...) {                                                              \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;                                      \
        va_end(rest);                                                                                                  \
        return WRITES(flags) && at_fails("open", dir, path) ? -1 : NEXT(name)(dir, path, flags, mode);                 \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

int creat(const char *path, mode_t mode) {
    return at_fails("open", AT_FDCWD, path) ? -1 : NEXT(creat)(path, mode);
}

int creat64(const char *path, mode_t mode) {
    return at_fails("open", AT_FDCWD, path) ? -1 : NEXT(creat64)(path, mode);
}

FILE *fopen(const char *path, const char *mode) {
    return mode[strcspn(mode, "wa+")] && at_fails("open", AT_FDCWD, path) ? NULL : NEXT(fopen)(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
    return mode[strcspn(mode, "wa+")] && at_fails("open", AT_FDCWD, path) ? NULL : NEXT(fopen64)(path, mode);
}

int fsync(int fd) { return fd_fails("sync", fd) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return fd_fails("sync", fd) ? -1 : NEXT(fdatasync)(fd); }
int syncfs(int fd) { return fd_fails("sync", fd) ? -1 : NEXT(syncfs)(fd); }

/* What was only read has nothing left to write. */
int close(int fd) {
    int failing = WRITES(fcntl(fd, F_GETFL)) && fd_fails("close", fd), error = errno, answer = NEXT(close)(fd);
    if (!failing) return answer;
    errno = error;
    return -1;
}

int ftruncate(int fd, off_t size) { return fd_fails("truncate", fd) ? -1 : NEXT(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fd_fails("truncate", fd) ? -1 : NEXT(ftruncate64)(fd, size); }

int truncate(const char *path, off_t size) {
    return at_fails("truncate", AT_FDCWD, path) ? -1 : NEXT(truncate)(path, size);
}

int truncate64(const char *path, off64_t size) {
    return at_fails("truncate", AT_FDCWD, path) ? -1 : NEXT(truncate64)(path, size);
}

/* These two return the error and leave errno alone. */
int posix_fallocate(int fd, off_t at, off_t size) {
    return fd_fails("allocate", fd) ? errno : NEXT(posix_fallocate)(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size) {
    return fd_fails("allocate", fd) ? errno : NEXT(posix_fallocate64)(fd, at, size);
}

int fallocate(int fd, int mode, off_t at, off_t size) {
    return fd_fails("allocate", fd) ? -1 : NEXT(fallocate)(fd, mode, at, size);
}

int fallocate64(int fd, int mode, off64_t at, off64_t size) {
    return fd_fails("allocate", fd) ? -1 : NEXT(fallocate64)(fd, mode, at, size);
}

#define WRITES_MEMORY(protection, flags) (((protection) & PROT_WRITE) && ((flags) & MAP_SHARED))

void *mmap(void *place, size_t size, int protection, int flags, int fd, off_t at) {
    if (fd >= 0 && WRITES_MEMORY(protection, flags) && fd_fails("map", fd)) return MAP_FAILED;
    return NEXT(mmap)(place, size, protection, flags, fd, at);
}

void *mmap64(void *place, size_t size, int protection, int flags, int fd, off64_t at) {
    if (fd >= 0 && WRITES_MEMORY(protection, flags) && fd_fails("map", fd)) return MAP_FAILED;
    return NEXT(mmap64)(place, size, protection, flags, fd, at);
}

/* Of two names, the one that is to come. */
int rename(const char *from, const char *to) {
    return at_fails("rename", AT_FDCWD, to) ? -1 : NEXT(rename)(from, to);
}

int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return at_fails("rename", to_dir, to) ? -1 : NEXT(renameat)(from_dir, from, to_dir, to);
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned int flags) {
    return at_fails("rename", to_dir, to) ? -1 : NEXT(renameat2)(from_dir, from, to_dir, to, flags);
}

int mkdir(const char *path, mode_t mode) { return at_fails("mkdir", AT_FDCWD, path) ? -1 : NEXT(mkdir)(path, mode); }

int mkdirat(int dir, const char *path, mode_t mode) {
    return at_fails("mkdir", dir, path) ? -1 : NEXT(mkdirat)(dir, path, mode);
}

int symlink(const char *target, const char *path) {
    return at_fails("link", AT_FDCWD, path) ? -1 : NEXT(symlink)(target, path);
}

int symlinkat(const char *target, int dir, const char *path) {
    return at_fails("link", dir, path) ? -1 : NEXT(symlinkat)(target, dir, path);
}

int link(const char *from, const char *to) { return at_fails("link", AT_FDCWD, to) ? -1 : NEXT(link)(from, to); }

int unlink(const char *path) { return at_fails("remove", AT_FDCWD, path) ? -1 : NEXT(unlink)(path); }
int rmdir(const char *path) { return at_fails("remove", AT_FDCWD, path) ? -1 : NEXT(rmdir)(path); }
int remove(const char *path) { return at_fails("remove", AT_FDCWD, path) ? -1 : NEXT(remove)(path); }

int unlinkat(int dir, const char *path, int flags) {
    return at_fails("remove", dir, path) ? -1 : NEXT(unlinkat)(dir, path, flags);
}

#define TELLS_ROOM(name, type, argument)                                                                               \
    int name(argument where, struct type *answer) {                                                                    \
        int result = NEXT(name)(where, answer);                                                                        \
        if (!result && planned() && plan.free >= 0) answer->f_bavail = answer->f_bfree = plan.free / answer->f_frsize; \
        return result;                                                                                                 \
    }
TELLS_ROOM(statvfs, statvfs, const char *)
TELLS_ROOM(statvfs64, statvfs64, const char *)
TELLS_ROOM(fstatvfs, statvfs, int)
TELLS_ROOM(fstatvfs64, statvfs64, int)
