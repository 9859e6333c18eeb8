# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""Decides which of a guest's frames may leave, from a copy of their first bytes, without the GIL and without a lock.

The rules never change. What is learned is in a table, whose pointer the network device's thread (the reader) loads once
for each frame; a table never changes. `learn` builds a new table, publishes it by one store, and frees the old one once
the reader has left it.

Sources: RFC 791 (IPv4), RFC 8200 (IPv6), RFC 826 (ARP), RFC 4861 (neighbour discovery), RFC 2131 (DHCP), RFC 6890
(special-purpose addresses), RFC 6052 (IPv4 addresses in IPv6).
"""
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy

from vmm._sys cimport CLOCK_MONOTONIC_COARSE, clock_ns, counter_add, counter_read, counters_read

# A network and a range of ports. IPv4 addresses are mapped to ::ffff:0:0/96. Both halves are in host byte order.
cdef struct Rule:
    uint64_t high
    uint64_t low
    uint64_t high_mask
    uint64_t low_mask
    uint16_t first      # port; 0: ping and all ports but those of nameservers
    uint16_t last

# An address to which an allowed name resolved.
cdef struct Learned:
    uint64_t high
    uint64_t low
    uint16_t first
    uint16_t last
    uint64_t until      # end of the time for new connections; CLOCK_MONOTONIC, seconds
    uint64_t used       # time of the last frame to it; written by the reader

cdef struct Table:
    size_t n_learned
    Learned *learned    # sorted by address, then by port

cdef extern from *:
    """
    #include <sched.h>
    #include <stdint.h>
    /* The reader's store to `reading` must be visible before its load of the table, and the writer's store of the table
       before its load of `reading`. Hence SEQ_CST. */
    #define policy_enter(reading) __atomic_fetch_add(reading, 1, __ATOMIC_SEQ_CST)
    #define policy_leave(reading) __atomic_fetch_add(reading, 1, __ATOMIC_RELEASE)
    #define policy_table(table) __atomic_load_n(table, __ATOMIC_SEQ_CST)
    #define policy_swap(table, new) __atomic_exchange_n(table, new, __ATOMIC_SEQ_CST)
    #define NAT64 0x0064ff9b00000000u  /* 64:ff9b::/96: behind it is an IPv4 address, to which a gateway translates */
    #define policy_set(to, value) __atomic_store_n(to, value, __ATOMIC_RELAXED)
    static inline void policy_wait(uint64_t *reading) {
        uint64_t seen = __atomic_load_n(reading, __ATOMIC_SEQ_CST);
        while (seen & 1 && __atomic_load_n(reading, __ATOMIC_SEQ_CST) == seen)
            sched_yield();
    }
    """
    const uint64_t NAT64
    uint64_t policy_enter(uint64_t *reading) noexcept nogil
    uint64_t policy_leave(uint64_t *reading) noexcept nogil
    Table *policy_table(Table **table) noexcept nogil
    Table *policy_swap(Table **table, Table *new) noexcept nogil
    void policy_set(uint64_t *to, uint64_t value) noexcept nogil
    void policy_wait(uint64_t *reading) noexcept nogil

# Names of the verdicts from DROPPED on.
REASONS = ("malformed", "protocol", "options", "fragment", "source", "special", "nameserver", "address")
MOST_LEARNED = 4096

cdef enum:
    ICMP = 1
    TCP = 6
    UDP = 17
    ICMPV6 = 58
    SECOND = 1_000_000_000
    # Seconds since the last frame for which a flow other than TCP may continue after its address expired (as in
    # nf_conntrack).
    STREAM_SECONDS = 180


cdef class Policy:
    """The addresses that one guest may reach: only those that a rule allows or that were learned.

    :param guest: the guest's own IPv4 address, four bytes; frames from other addresses are dropped
    :param guest_bits: prefix length, if the guest has a whole network; 0: any source address
    :param gateway: IPv4 address that may be mapped to the host's loopback; never allowed
    :param resolver: IPv4 address of the DNS resolver for the guest
    :param allow: rules ``(address, bits, first, last)``: an IPv6 address of 16 bytes (IPv4 in ::ffff:0:0/96), the
        prefix length, and the first and last port; 0 and 0: all ports
    :param deny: rules that take precedence over `allow`
    :param only_special: allow every address except special ones, such as any that reaches the host's loopback
    :raises ValueError: an address or a prefix length is out of range

    Loopback, multicast and broadcast addresses are never allowed. Link-local addresses need a rule for them alone, and
    nameservers a rule for their port. Only one thread checks frames.
    """
    cdef Rule *rules                # the deny rules, then the allow rules
    cdef size_t n_deny
    cdef size_t n_rules
    cdef Table *table               # replaced whole; the reader loads the pointer once
    cdef bytearray rules_memory     # behind `rules`
    cdef bytearray table_memory     # behind `table`
    cdef uint64_t reading           # odd while the reader has a table
    cdef readonly bint only_special
    cdef uint32_t guest
    cdef uint32_t guest_mask
    cdef uint8_t[4] gateway
    cdef uint8_t[4] resolver
    cdef uint64_t[VERDICTS] frames
    cdef uint64_t bytes_allowed
    cdef uint64_t bytes_dropped
    cdef uint64_t evicted
    cdef PolicyCalls _calls

    def __init__(self, bytes guest=bytes(4), bytes gateway=bytes(4), bytes resolver=bytes(4), allow=(), deny=(),
                 *, bint only_special=False, int guest_bits=32):
        cdef Rule *rule
        cdef size_t i
        if not len(guest) == len(gateway) == len(resolver) == 4:
            raise ValueError("guest, gateway and resolver must be IPv4 addresses of four bytes")
        if not 0 <= guest_bits <= 32:
            raise ValueError(f"guest_bits must be 0 to 32, not {guest_bits}")
        self.guest_mask = <uint32_t>((<uint64_t>0xffff_ffff << (32 - guest_bits)) & 0xffff_ffff)
        self.guest = <uint32_t>int.from_bytes(guest, "big") & self.guest_mask
        memcpy(self.gateway, <const char *>gateway, 4)
        memcpy(self.resolver, <const char *>resolver, 4)
        self.only_special = only_special
        self._calls = PolicyCalls(<void *>self, call_check, call_count)
        self.n_deny, self.n_rules = len(deny), len(deny) + len(allow)
        self.rules_memory = bytearray(self.n_rules * sizeof(Rule))
        self.rules = <Rule *>PyByteArray_AS_STRING(self.rules_memory)
        for i, (address, bits, first, last) in enumerate([*deny, *allow]):
            if not 0 <= bits <= 128:
                raise ValueError("a rule's prefix length must be 0 to 128")
            rule = &self.rules[i]
            mask = ((1 << bits) - 1) << (128 - bits)
            rule.high_mask, rule.low_mask = mask >> 64, mask & 0xffff_ffff_ffff_ffff
            rule.high, rule.low = _halves(address)
            rule.high &= rule.high_mask
            rule.low &= rule.low_mask
            rule.first, rule.last = first, last
        self._publish([])

    # Called from Python, by one thread at a time: the GIL is held while a table is replaced.

    def learn(self, entries):
        """Allow addresses for some time. An address that is already known keeps the longer time.

        :param entries: ``(address, first, last, seconds)`` each: as in a rule, and how long new connections are allowed
        :raises ValueError: an address does not have 16 bytes

        After that, new connections are refused. Open TCP connections continue, and so do other flows that had a frame
        within the last three minutes. At most `MOST_LEARNED` addresses are kept; the least recently used go first.
        """
        cdef uint64_t now = clock_ns(CLOCK_MONOTONIC_COARSE) // SECOND
        cdef dict known = {entry[:3]: entry[3:] for entry in self.learned()}
        for address, first, last, seconds in entries:
            until, used = known.get((address, first, last), (0, 0))
            known[address, first, last] = max(until, now + seconds), max(used, now)
        learned = [(*key, *value) for key, value in known.items()]
        if len(learned) > MOST_LEARNED:
            learned.sort(key=lambda entry: entry[4], reverse=True)
            self.evicted += <uint64_t>(len(learned) - MOST_LEARNED)
            del learned[MOST_LEARNED:]
        self._publish(sorted(learned))

    def learned(self):
        """The learned addresses: a list of ``(address, first, last, until, used)``, two times of CLOCK_MONOTONIC."""
        cdef Table *table = self.table
        cdef Learned *each
        found = []
        for i in range(table.n_learned):
            each = &table.learned[i]
            address = (<object>each.high << 64 | each.low).to_bytes(16, "big")
            found.append((address, each.first, each.last, each.until, counter_read(&each.used)))
        return found

    def allows(self, bytes address):
        """Whether a rule allows an address of 16 bytes at some port. Learned addresses do not count."""
        cdef uint64_t high, low
        high, low = _halves(address)
        for i in range(self.n_rules):
            if matches(&self.rules[i], high, low):
                if i >= self.n_deny:
                    return True
                if self.rules[i].first == 0:
                    return False
        return False

    @property
    def pointer(self):
        """Address of the C struct PolicyCalls, for the device's thread; valid as long as this object."""
        return <uintptr_t>&self._calls

    @property
    def counters(self):
        """Frames and bytes, by verdict."""
        cdef uint64_t[VERDICTS] frames
        counters_read(frames, self.frames, sizeof(frames))
        found = {
            "allowed": frames[ALLOWED], "allowed_bytes": counter_read(&self.bytes_allowed),
            "resolver": frames[TO_RESOLVER],
            "dropped": sum([frames[i] for i in range(DROPPED, VERDICTS)]),
            "dropped_bytes": counter_read(&self.bytes_dropped), "evicted": self.evicted,
        }
        return found | {f"dropped_{name}": frames[DROPPED + i] for i, name in enumerate(REASONS)}

    cdef _publish(self, list learned):
        cdef bytearray memory = bytearray(sizeof(Table) + len(learned) * sizeof(Learned))
        cdef Table *new = <Table *>PyByteArray_AS_STRING(memory)
        cdef Learned *each = <Learned *>(new + 1)
        new.n_learned, new.learned = len(learned), each
        for address, first, last, until, used in learned:
            each.high, each.low = _halves(address)
            each.first, each.last, each.until, each.used = first, last, until, used
            each += 1
        policy_swap(&self.table, new)
        policy_wait(&self.reading)
        self.table_memory = memory      # which frees that of the table before

    # The reader

    cdef int check(self, const uint8_t *head, uint64_t size) noexcept nogil:
        # The verdict on a frame of `size` bytes. `head` is a copy of its first HEAD bytes, padded with zeros, which the
        # guest cannot change.
        cdef uint32_t kind = be16(&head[12])
        cdef int verdict
        if self.only_special:
            return SPECIAL if is_hosts(head, kind) else ALLOWED
        if size < ETH_HEADER:
            return MALFORMED
        if kind == 0x0800 or kind == 0x86dd:
            policy_enter(&self.reading)
            verdict = self.check_ipv4(&head[ETH_HEADER], size - ETH_HEADER) if kind == 0x0800 \
                else self.check_ipv6(&head[ETH_HEADER], size - ETH_HEADER)
            policy_leave(&self.reading)
            return verdict
        if kind != 0x0806:
            return PROTOCOL         # includes VLAN tags, which nothing here uses
        # ARP for Ethernet and IPv4. The other end of the link answers it, so it goes no further.
        return ALLOWED if size >= 42 and memcmp(&head[14], b"\0\1\x08\0\6\4", 6) == 0 else MALFORMED

    cdef int check_ipv4(self, const uint8_t *ip, uint64_t size) noexcept nogil:
        cdef uint32_t whole = be16(&ip[2]), source = be32(&ip[12]), target = be32(&ip[16])
        cdef bint mine = source & self.guest_mask == self.guest
        if size < 20 or ip[0] >> 4 != 4 or ip[0] & 15 < 5 or whole < <uint32_t>(ip[0] & 15) * 4 or whole > size:
            return MALFORMED
        if ip[0] & 15 != 5:
            return OPTIONS          # they include source routes
        if be16(&ip[6]) & 0xbfff:   # any flag or offset but "do not fragment"
            return FRAGMENT
        if ip[9] == UDP and target == <uint32_t>0xffff_ffff and whole >= 28 and be32(&ip[20]) == 68 << 16 | 67 \
                and (source == 0 or mine):
            return ALLOWED          # DHCP, which the other end of the link answers
        if not mine or is_special4(source):
            return SOURCE
        if memcmp(&ip[16], self.resolver, 4) == 0:
            return TO_RESOLVER
        if is_special4(target) or memcmp(&ip[16], self.gateway, 4) == 0:
            return SPECIAL
        return self.check_target(0, <uint64_t>0xffff << 32 | target, ip[9], &ip[20], whole - 20)

    cdef int check_ipv6(self, const uint8_t *ip, uint64_t size) noexcept nogil:
        cdef uint64_t high = be64(&ip[24]), low = be64(&ip[32])
        cdef uint32_t payload = be16(&ip[4])
        if size < 40 or ip[0] >> 4 != 6 or 40 + payload > size:
            return MALFORMED
        if ip[6] == 44:
            return FRAGMENT
        if ip[6] == 0 or ip[6] == 43 or ip[6] == 50 or ip[6] == 51 or ip[6] == 60 or ip[6] == 135:
            return OPTIONS
        if ip[6] == ICMPV6 and ip[7] == 255 and payload >= 8 and is_neighbour(ip[40]) \
                and (high >> 48 == 0xff02 or high >> 54 == 0x3fa):
            return ALLOWED          # neighbour discovery on the link, whose other end answers it
        if is_special6(be64(&ip[8]), be64(&ip[16])):
            return SOURCE
        if is_special6(high, low) or high >> 54 == 0x3fa:   # fe80::/10 also reaches the host
            return SPECIAL
        return self.check_target(high, low, ip[6], &ip[40], payload)

    cdef int check_target(
            self, uint64_t high, uint64_t low, uint8_t protocol, const uint8_t *segment, uint64_t size) noexcept nogil:
        cdef bint v4 = high == 0
        if protocol == TCP:
            if size < 20:
                return MALFORMED
            return self.look_up(high, low, be16(&segment[2]), segment[13] & 0x12 == 0x02, True)
        if protocol == UDP:
            if size < 8:
                return MALFORMED
            return self.look_up(high, low, be16(&segment[2]), True, False)
        if protocol == (ICMP if v4 else ICMPV6):
            if size < 8:
                return MALFORMED
            if segment[0] == (8 if v4 else 128) or (not v4 and is_neighbour(segment[0])):
                return self.look_up(high, low, 0, True, False)
        return PROTOCOL

    cdef int look_up(self, uint64_t high, uint64_t low, uint32_t port, bint begins, bint tcp) noexcept nogil:
        # The verdict on a destination; port 0: ping. `begins`: the frame may start a new flow.
        cdef Table *table = policy_table(&self.table)
        cdef bint nameserver = port == 53 or port == 853
        # Only rules with a prefix of 16 bits or more allow 169.254.0.0/16.
        cdef bint local = (high == 0 and low >> 16 == <uint64_t>0xffff_a9fe) or (high == NAT64 and low >> 16 == 0xa9fe)
        cdef uint64_t now
        cdef size_t i, first = 0, last = table.n_learned, middle
        cdef Rule *rule
        cdef Learned *each
        if self.is_denied(high, low, port):
            return ADDRESS
        if high == NAT64 and low >> 32 == 0 and self.is_denied(0, <uint64_t>0xffff << 32 | low, port):
            return ADDRESS
        for i in range(self.n_deny, self.n_rules):
            rule = &self.rules[i]
            if not matches(rule, high, low) or (local and not rule.low_mask >> 16 & 1):
                continue
            if rule.first <= port <= rule.last or (rule.first == 0 and not nameserver):
                return ALLOWED
        while first < last:
            middle = (first + last) >> 1
            each = &table.learned[middle]
            if each.high < high or (each.high == high and each.low < low):
                first = middle + 1
            else:
                last = middle
        now = clock_ns(CLOCK_MONOTONIC_COARSE) // SECOND
        for i in range(first, table.n_learned):
            each = &table.learned[i]
            if each.high != high or each.low != low:
                break
            if not each.first <= port <= each.last and (each.first or nameserver):
                continue
            if now < each.until or (tcp and not begins) or (not tcp and now < each.used + STREAM_SECONDS):
                policy_set(&each.used, now)
                return ALLOWED
        return NAMESERVER if nameserver else ADDRESS

    cdef bint is_denied(self, uint64_t high, uint64_t low, uint32_t port) noexcept nogil:
        cdef Rule *rule
        cdef size_t i
        for i in range(self.n_deny):
            rule = &self.rules[i]
            if (rule.first == 0 or rule.first <= port <= rule.last) and matches(rule, high, low):
                return True
        return False

    cdef void count(self, int verdict, uint64_t size) noexcept nogil:
        counter_add(&self.frames[verdict], 1)
        if verdict == ALLOWED:
            counter_add(&self.bytes_allowed, size)
        elif verdict >= DROPPED:
            counter_add(&self.bytes_dropped, size)


cdef inline uint32_t be16(const uint8_t *at) noexcept nogil:
    return <uint32_t>at[0] << 8 | at[1]


cdef inline uint32_t be32(const uint8_t *at) noexcept nogil:
    return be16(at) << 16 | be16(&at[2])


cdef inline uint64_t be64(const uint8_t *at) noexcept nogil:
    return <uint64_t>be32(at) << 32 | be32(&at[4])


cdef inline bint matches(const Rule *rule, uint64_t high, uint64_t low) noexcept nogil:
    return high & rule.high_mask == rule.high and low & rule.low_mask == rule.low


cdef inline bint is_neighbour(uint8_t kind) noexcept nogil:
    # Whether an ICMPv6 message is a router's or a neighbour's solicitation, or a neighbour's advertisement.
    return kind == 133 or kind == 135 or kind == 136


cdef inline bint is_special4(uint32_t address) noexcept nogil:
    # 0.0.0.0/8 (this network), loopback, multicast, and the reserved addresses above it.
    return address >> 24 == 0 or address >> 24 == 127 or address >> 28 >= 14


cdef inline bint is_special6(uint64_t high, uint64_t low) noexcept nogil:
    # Multicast, unspecified, loopback, and IPv4 in IPv6, through which a host socket could reach 127.0.0.1.
    return high >> 56 == 0xff or is_hosts6(high, low)


cdef bint is_hosts(const uint8_t *head, uint32_t kind) noexcept nogil:
    # Whether a frame's source or destination means the host itself to a program that opens a socket for it: 0.0.0.0/8,
    # 127.0.0.0/8 and so on.
    if kind == 0x0800:
        return head[30] == 0 or head[30] == 127 or head[26] == 127
    if kind == 0x86dd:
        return is_hosts6(be64(&head[38]), be64(&head[46])) or (
            is_hosts6(be64(&head[22]), be64(&head[30])) and be64(&head[30]) != 0)
    return False


cdef inline bint is_hosts6(uint64_t high, uint64_t low) noexcept nogil:
    return high == 0 and (low >> 32 == 0 or low >> 32 == 0xffff)


cdef object _halves(bytes address):
    if len(address) != 16:
        raise ValueError(f"an address must have 16 bytes (IPv4 as ::ffff:a.b.c.d), not {len(address)}")
    return int.from_bytes(address[:8], "big"), int.from_bytes(address[8:], "big")


cdef int call_check(void *policy, const uint8_t *head, uint64_t size) noexcept nogil:
    return (<Policy>policy).check(head, size)


cdef void call_count(void *policy, int verdict, uint64_t size) noexcept nogil:
    (<Policy>policy).count(verdict, size)
