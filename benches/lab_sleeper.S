# SPDX-License-Identifier: Apache-2.0
# A guest that only falls asleep: a LAPIC timer is set to a time that differs in each turn, then `sti; hlt`. An interrupt
# that is taken between the two, although sti holds it back for one instruction, is the last: nothing wakes it again.
    .code32
    .section .note.pvh, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long start

    .text
    .globl start
start:
    movl $stack, %esp
    lgdt gdt_at
    ljmp $8, $1f
1:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $fired, %eax
    movw %ax, gate
    shrl $16, %eax
    movw %ax, gate + 6
    lidt idt_at
    movb $0xff, %al             # no interrupts of the PICs
    outb %al, $0x21
    outb %al, $0xa1
    movl $0x1b, %ecx            # x2APIC
    rdmsr
    orl $0xc00, %eax
    wrmsr
    xorl %edx, %edx
    movl $0x80f, %ecx           # spurious vector, enabled
    movl $0x1ff, %eax
    wrmsr
    movl $0x83e, %ecx           # divide by 1: nanoseconds in KVM
    movl $0xb, %eax
    wrmsr
    movl $0x832, %ecx           # the timer: one shot, vector 0x20
    movl $0x20, %eax
    wrmsr
    movl $TURNS, %edi
turn:
    cli
    imull $7919, %edi, %eax     # up to a quarter of a millisecond
    andl $0x3ffff, %eax
    incl %eax
    movl $0x838, %ecx
    xorl %edx, %edx
    wrmsr
    sti
    hlt
    decl %edi
    jnz turn
    movb $7, %al
    outb %al, $0xf4
2:  hlt
    jmp 2b

fired:
    pushl %eax
    pushl %ecx
    pushl %edx
    movl $0x80b, %ecx           # end of interrupt
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popl %edx
    popl %ecx
    popl %eax
    iret

    .data
    .balign 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_at:
    .word 23
    .long gdt
idt_at:
    .word 0x21 * 8 - 1
    .long idt
    .balign 8
idt:
    .fill 0x20, 8, 0
gate:
    .word 0, 8, 0x8e00, 0
    .fill 1024, 4, 0
stack:
