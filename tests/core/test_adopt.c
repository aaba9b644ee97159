/* A region that is closed while another thread waits to adopt it. The waiting goes on here (build.mk). */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <time.h>

static sem_t waiting, closed;
static _Atomic int waits;

int __wrap_nanosleep(const struct timespec *time, struct timespec *rest);

int __wrap_nanosleep(const struct timespec *time, struct timespec *rest)
{
    (void)time, (void)rest;
    if (atomic_fetch_add(&waits, 1) == 0) {
        sem_post(&waiting);
        sem_wait(&closed);
    }
    return 0;
}

static void *adopt(void *region)
{
    static int status;
    status = ndm_region_adopt(region);
    CHECK(status == ndm_last_error()->status);
    return &status;
}

int main(void)
{
    const ndm_options options = {.initial_capacity = 1 << 20, .max_capacity = 1 << 20, .alignment = 64};
    ndm_region *region = ndm_region_open_temporary("/var/tmp", &options);
    pthread_t thread;
    void *result;
    CHECK(region && sem_init(&waiting, 0, 0) == 0 && sem_init(&closed, 0, 0) == 0);
    CHECK(pthread_create(&thread, NULL, adopt, region) == 0);
    sem_wait(&waiting);
    CHECK(ndm_region_close(region) == NDM_OK);
    sem_post(&closed);
    CHECK(pthread_join(thread, &result) == 0 && *(int *)result == NDM_ERR_CLOSED && atomic_load(&waits) == 1);
    ndm_region_destroy(region);
    printf("adopting a region that closes finds it closed\n");
    return 0;
}
