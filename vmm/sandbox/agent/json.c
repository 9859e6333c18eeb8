// SPDX-License-Identifier: Apache-2.0
// The text of a request: one JSON object. Its values are strings, whole numbers, true, false, null, or arrays of these.
// A byte that is not UTF-8 is written as \udc80 to \udcff, as Python's surrogateescape has it.
// Source: RFC 8259; PEP 383.
#include "agent.h"
#include "libc.h"

static char *at; // what is read next; a NUL byte, which no text has, is behind the last

static void skip_space(void)
{
    while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')
        at++;
}

static int take(char wanted)
{
    skip_space();
    int found = *at == wanted;
    at += found;
    return found;
}

static int is_digit(char byte)
{
    return byte >= '0' && byte <= '9';
}

// The four digits of \uXXXX; -1: they are not four digits.
static long read_unit(void)
{
    long unit = 0;
    for (int i = 0; i < 4; i++, at++) {
        char lower = (char)(*at | 0x20);
        if (is_digit(*at))
            unit = unit << 4 | (*at - '0');
        else if (lower >= 'a' && lower <= 'f')
            unit = unit << 4 | (lower - 'a' + 10);
        else
            return -1;
    }
    return unit;
}

// Decode what follows \u. Returns where the text ends then, or NULL.
static char *read_escape(char *to)
{
    long code = read_unit();
    if (code >= 0xdc80 && code <= 0xdcff) {
        *to++ = (char)code;
        return to;
    }
    if (code >= 0xd800 && code <= 0xdbff && at[0] == '\\' && at[1] == 'u') {
        at += 2;
        long low = read_unit();
        code = low >= 0xdc00 && low <= 0xdfff ? 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00) : -1;
    }
    if (code <= 0 || (code >= 0xd800 && code <= 0xdfff))
        return NULL;
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char first[] = {0, 0xc0, 0xe0, 0xf0};
    *to++ = (char)(first[more] | code >> 6 * more);
    while (more--)
        *to++ = (char)(0x80 | (code >> 6 * more & 0x3f));
    return to;
}

// A string, decoded in its place, which it fits: no escape is shorter than what it stands for. NULL: it is not valid.
static char *read_string(void)
{
    static const char letters[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    if (!take('"'))
        return NULL;
    char *start = at, *to = at;
    while (to && *at != '"') {
        const char *letter = *at == '\\' && at[1] ? strchr(letters, at[1]) : NULL;
        if ((unsigned char)*at < ' ') {
            return NULL;
        } else if (letter) {
            *to++ = meant[letter - letters];
            at += 2;
        } else if (*at != '\\') {
            *to++ = *at++;
        } else if (*++at == 'u') {
            at++;
            to = read_escape(to);
        } else {
            return NULL;
        }
    }
    if (!to)
        return NULL;
    at++;
    *to = 0;
    return start;
}

static int take_word(const char *word)
{
    size_t length = strlen(word);
    if (strncmp(at, word, length))
        return 0;
    at += length;
    return 1;
}

// Returns 0 if the value is not valid. Of false and null `value` is NULL.
static int read_value(const char **value)
{
    skip_space();
    *value = NULL;
    if (*at == '"') {
        *value = read_string();
        return *value != NULL;
    }
    if (*at == '-' || is_digit(*at)) {
        char *to = at - 1; // one byte to the front, so that there is room for its end
        *value = to;
        do
            *to++ = *at++;
        while (is_digit(*at));
        *to = 0;
        const char *digits = *value + (**value == '-');
        return *digits && (*digits != '0' || !digits[1]);
    }
    if (take_word("true")) {
        *value = "1";
        return 1;
    }
    return take_word("false") || take_word("null");
}

const char *next_value(const struct request *request, const char *key, int *index)
{
    while (*index < request->count) {
        const struct parameter *each = &request->parameters[(*index)++];
        if (!strcmp(each->key, key))
            return each->value;
    }
    return NULL;
}

const char *value(const struct request *request, const char *key)
{
    int index = 0;
    return next_value(request, key, &index);
}

// Returns 0, or the error: EINVAL, or E2BIG for too many values. `text` has a NUL byte behind it and is changed.
int parse_request(char *text, size_t length, struct request *request)
{
    request->count = 0;
    at = text;
    if (!take('{'))
        return EINVAL;
    if (!take('}')) {
        do {
            const char *key = read_string();
            if (!key || !take(':'))
                return EINVAL;
            int many = take('[');
            if (!many || !take(']')) {
                do {
                    const char *value;
                    if (!read_value(&value))
                        return EINVAL;
                    if (value && request->count == PARAMETERS_MAX)
                        return E2BIG;
                    if (value)
                        request->parameters[request->count++] = (struct parameter){key, value};
                } while (many && take(','));
                if (many && !take(']'))
                    return EINVAL;
            }
        } while (take(','));
        if (!take('}'))
            return EINVAL;
    }
    skip_space();
    request->verb = value(request, "verb");
    return at == text + length && request->verb ? 0 : EINVAL;
}
