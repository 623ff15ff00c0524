/* Damages an HDF5 file in place, for the tests of foreign traces.
 *
 *   h5edit FILE COMMAND...
 *   set PATH INDEX COUNT VALUE    values of the flattened dataset, from INDEX on; "nan" is a value
 *   copy PATH FROM TO             one value
 *   rows PATH ROWS                a new first extent
 *   remake PATH TYPE ROWS A B     zeros of a type (i64, u8, u16, f16, f32) and shape; 0: no axis
 *   delete PATH                   a dataset
 *   number NAME VALUE             an attribute of the root
 *   text NAME VALUE
 *   strip NAME                    removes it */
#include <hdf5.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("h5edit: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static hid_t good(hid_t id, const char *what) {
    if (id < 0) die("%s", what);
    return id;
}

/* Reads or writes one value of a dataset, as a double that HDF5 converts. */
static void transfer(hid_t dataset, hsize_t index, double *value, int write) {
    hsize_t shape[H5S_MAX_RANK], at[H5S_MAX_RANK];
    hid_t space = H5Dget_space(dataset), one = H5Screate(H5S_SCALAR);
    int rank = H5Sget_simple_extent_dims(space, shape, NULL);
    for (int i = rank - 1; i >= 0; i--) {
        at[i] = index % shape[i];
        index /= shape[i];
    }
    if (index > 0) die("no such index");
    H5Sselect_elements(space, H5S_SELECT_SET, 1, at);
    good(write ? H5Dwrite(dataset, H5T_NATIVE_DOUBLE, one, space, H5P_DEFAULT, value)
               : H5Dread(dataset, H5T_NATIVE_DOUBLE, one, space, H5P_DEFAULT, value),
         "transfer");
    H5Sclose(one);
    H5Sclose(space);
}

static hid_t type_named(const char *name) {
    if (strcmp(name, "i64") == 0) return H5T_STD_I64LE;
    if (strcmp(name, "u8") == 0) return H5T_STD_U8LE;
    if (strcmp(name, "u16") == 0) return H5T_STD_U16LE;
    if (strcmp(name, "f32") == 0) return H5T_IEEE_F32LE;
    if (strcmp(name, "f16") == 0) {
        hid_t half = H5Tcopy(H5T_IEEE_F32LE);
        H5Tset_fields(half, 15, 10, 5, 0, 10);
        H5Tset_size(half, 2);
        H5Tset_ebias(half, 15);
        return half;
    }
    die("unknown type %s", name);
}

static void remake(hid_t file, char **args) {
    hsize_t shape[3];
    int rank = 0;
    for (; rank < 3 && (rank == 0 || atoi(args[2 + rank]) > 0); rank++)
        shape[rank] = strtoull(args[2 + rank], NULL, 10);
    good(H5Ldelete(file, args[0], H5P_DEFAULT), args[0]);
    hid_t space = H5Screate_simple(rank, shape, NULL);
    hid_t dataset = good(H5Dcreate2(file, args[0], type_named(args[1]), space, H5P_DEFAULT,
                                    H5P_DEFAULT, H5P_DEFAULT),
                         args[0]);
    /* Written, so that the file holds them. */
    void *zeros = calloc((size_t)H5Sget_simple_extent_npoints(space) + 1, sizeof(double));
    good(H5Dwrite(dataset, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros), args[0]);
    free(zeros);
    H5Dclose(dataset);
    H5Sclose(space);
}

static void set_rows(hid_t file, char **args) {
    hsize_t shape[H5S_MAX_RANK];
    hid_t dataset = good(H5Dopen2(file, args[0], H5P_DEFAULT), args[0]);
    hid_t space = H5Dget_space(dataset);
    H5Sget_simple_extent_dims(space, shape, NULL);
    shape[0] = strtoull(args[1], NULL, 10);
    good(H5Dset_extent(dataset, shape), args[0]);
    H5Sclose(space);
    H5Dclose(dataset);
}

static void set_attribute(hid_t file, const char *name, hid_t type, const void *value) {
    H5Adelete(file, name);
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t attribute = good(H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT), name);
    good(H5Awrite(attribute, type, value), name);
    H5Aclose(attribute);
    H5Sclose(space);
}

/* Carries out one command; its number of arguments. */
static int edit(hid_t file, const char *command, int count, char **args) {
    if (strcmp(command, "set") == 0 && count >= 4) {
        hid_t dataset = good(H5Dopen2(file, args[0], H5P_DEFAULT), args[0]);
        double value = strtod(args[3], NULL);
        hsize_t first = strtoull(args[1], NULL, 10), values = strtoull(args[2], NULL, 10);
        for (hsize_t i = 0; i < values; i++) transfer(dataset, first + i, &value, 1);
        H5Dclose(dataset);
        return 4;
    }
    if (strcmp(command, "copy") == 0 && count >= 3) {
        hid_t dataset = good(H5Dopen2(file, args[0], H5P_DEFAULT), args[0]);
        double value;
        transfer(dataset, strtoull(args[1], NULL, 10), &value, 0);
        transfer(dataset, strtoull(args[2], NULL, 10), &value, 1);
        H5Dclose(dataset);
        return 3;
    }
    if (strcmp(command, "rows") == 0 && count >= 2) {
        set_rows(file, args);
        return 2;
    }
    if (strcmp(command, "remake") == 0 && count >= 5) {
        remake(file, args);
        return 5;
    }
    if (strcmp(command, "delete") == 0 && count >= 1) {
        good(H5Ldelete(file, args[0], H5P_DEFAULT), args[0]);
        return 1;
    }
    if (strcmp(command, "number") == 0 && count >= 2) {
        long long value = atoll(args[1]);
        set_attribute(file, args[0], H5T_NATIVE_LLONG, &value);
        return 2;
    }
    if (strcmp(command, "text") == 0 && count >= 2) {
        hid_t type = H5Tcopy(H5T_C_S1);
        H5Tset_size(type, strlen(args[1]) + 1);
        set_attribute(file, args[0], type, args[1]);
        H5Tclose(type);
        return 2;
    }
    if (strcmp(command, "strip") == 0 && count >= 1) {
        good(H5Adelete(file, args[0]), args[0]);
        return 1;
    }
    die("unknown command, or too few arguments: %s", command);
}

int main(int argc, char **argv) {
    if (argc < 3) die("FILE COMMAND...");
    hid_t file = good(H5Fopen(argv[1], H5F_ACC_RDWR, H5P_DEFAULT), argv[1]);
    for (int i = 2; i < argc;) i += 1 + edit(file, argv[i], argc - i - 1, argv + i + 1);
    return H5Fclose(file) < 0;
}
