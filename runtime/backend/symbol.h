/* Functions of libraries that are loaded when they are used. */
#ifndef SIDA_RUNTIME_BACKEND_SYMBOL_H
#define SIDA_RUNTIME_BACKEND_SYMBOL_H

#include <dlfcn.h>
#include <stdbool.h>
#include <string.h>

/* *function: a function pointer of any type, out of dlsym's object pointer, as POSIX has it. False
 * where the library has no such function. */
static inline bool sida_symbol(void *library, void *function, const char *name) {
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

#endif
