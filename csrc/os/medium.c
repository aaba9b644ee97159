/* See medium.h. */
#define _GNU_SOURCE
#include "os/medium.h"

#include "os/fork.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

/* In mountinfo a blank, say, stands as \040. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *from = text; *from; to++) {
        const bool escaped = from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && from[2] && from[3];
        *to = escaped ? (char)((from[1] - '0') * 64 + (from[2] - '0') * 8 + (from[3] - '0')) : *from;
        from += escaped ? 4 : 1;
    }
    *to = 0;
}

/* The folder that an overlay writes to, out of a line of mountinfo; NULL if the line names none. */
static char *upper_folder(char *line)
{
    char *options = strstr(line, " - overlay ");
    char *found = options ? strstr(options, "upperdir=") : NULL;
    if (!found)
        return NULL;
    found += strlen("upperdir=");
    found[strcspn(found, ",\n")] = 0;
    unescape(found);
    return found;
}

/* Where the overlay that is mounted as this device keeps what is written to it. A folder of a container's host has no path
 * here: then nobody knows. */
static int medium_below(dev_t device)
{
    char wanted[32], *line = NULL;
    size_t room = 0;
    int medium = NDM_MEDIUM_DISK;
    ndm_i_fork_bar(); /* no child finds the file listed */
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    if (!mounts) {
        ndm_i_fork_let();
        return medium;
    }
    snprintf(wanted, sizeof wanted, "%u:%u", major(device), minor(device));
    while (getline(&line, &room, mounts) > 0) {
        char found[32];
        struct statfs system;
        if (sscanf(line, "%*d %*d %31s", found) != 1 || strcmp(found, wanted) != 0)
            continue;
        const char *upper = upper_folder(line);
        if (upper && statfs(upper, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC))
            medium = NDM_MEDIUM_OVERLAY;
        break;
    }
    free(line);
    fclose(mounts);
    ndm_i_fork_let();
    return medium;
}

/* `folder`: a device is told apart by its folders, since a file of an overlay may have the device of another. */
static int medium_of(const struct statfs *system, dev_t folder)
{
    switch (system->f_type) {
    case TMPFS_MAGIC:
        return NDM_MEDIUM_TMPFS;
    case RAMFS_MAGIC:
        return NDM_MEDIUM_RAMFS;
    case OVERLAYFS_SUPER_MAGIC:
        return medium_below(folder);
    default:
        return NDM_MEDIUM_DISK;
    }
}

int ndm_i_medium(int fd)
{
    struct statfs system;
    if (fstatfs(fd, &system) != 0 || system.f_type == OVERLAYFS_SUPER_MAGIC)
        return NDM_MEDIUM_DISK; /* what the writer does for an overlay in vain does no harm */
    return medium_of(&system, 0);
}

static bool look_at(const char *path, struct statfs *system, struct stat *facts)
{
    return statfs(path, system) == 0 && stat(path, facts) == 0;
}

int ndm_path_medium(const char *path)
{
    struct statfs system;
    struct stat facts;
    char folder[PATH_MAX] = ".";
    const char *name = strrchr(path, '/');
    if (name && (size_t)(name - path) + 1 < sizeof folder) {
        memcpy(folder, path, (size_t)(name - path) + 1);
        folder[name - path + 1] = 0;
    }
    if (look_at(path, &system, &facts)) {
        struct statfs around;
        struct stat parent;
        if (!S_ISDIR(facts.st_mode) && look_at(folder, &around, &parent) && around.f_type == system.f_type)
            facts.st_dev = parent.st_dev;
        return medium_of(&system, facts.st_dev);
    }
    return errno == ENOENT && look_at(folder, &system, &facts) ? medium_of(&system, facts.st_dev) : NDM_MEDIUM_DISK;
}

int ndm_path_in_memory(const char *path) { return ndm_path_medium(path) != NDM_MEDIUM_DISK; }
