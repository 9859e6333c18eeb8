/* SPDX-License-Identifier: Apache-2.0 */
/* From a PVH entry (32-bit, ebx: start_info) to main() in ring 3 of long mode, with interrupts and IOPL 3: a driver in
   ring 3 runs natively even where a software KVM emulates all of ring 0. Everything below 12 GiB is mapped as it is,
   for both rings. Exceptions and interrupts come back to ring 0. */
.intel_syntax noprefix
.set BASE, 0x100000             /* guest.lds */
.set EFER, 0xc0000080

.section .note.Xen, "a", @note
.long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
.asciz "Xen"
.long BASE

.section .start, "awx"
base:
.code32
.globl _start
_start:
    cli
    cld
    mov edi, [ebx + 24]         /* hvm_start_info.cmdline_paddr */
    mov eax, offset pml4
    mov cr3, eax
    mov eax, cr4
    or eax, 0x620               /* PAE, OSFXSR, OSXMMEXCPT */
    mov cr4, eax
    mov ecx, EFER
    rdmsr
    or eax, 0x100               /* LME */
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    lgdt gdt_pointer
    .byte 0xea                  /* ljmp 0x08, long_mode */
    .long long_mode
    .word 0x08
.code64
long_mode:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, offset ring0_stack_top
    lidt idt_pointer
    mov eax, 0x28
    ltr ax
    mov al, 0xff                /* the two PICs say nothing: interrupts come by the IOAPIC */
    out 0x21, al
    out 0xa1, al
    push 0x1b
    push offset stack_top
    push 0x3202                 /* IOPL 3, IF */
    push 0x23
    push offset ring3
    iretq
ring3:
    mov eax, 0x1b
    mov ds, eax
    mov es, eax
    call start

.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    /* 08: code, ring 0 */
    .quad 0x00cf93000000ffff    /* 10: data, ring 0 */
    .quad 0x00cff3000000ffff    /* 1b: data, ring 3 */
    .quad 0x00affb000000ffff    /* 23: code, ring 3 */
    .word tss_end - tss - 1, tss - base       /* 28: task state */
    .byte BASE >> 16, 0x89, 0, 0
    .quad 0
gdt_pointer:
    .word . - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
tss:
    .long 0
    .quad ring0_stack_top       /* rsp0 */
    .fill 88, 1, 0
    .word 0, 104
    .fill 128, 1, 0             /* ports below 0x400 are ring 3's, where its IOPL got lost too */
    .byte 0xff
tss_end:

/* 32 exceptions, each with an error code below its number; 16 interrupts that are counted and acknowledged. */
.balign 32
exceptions_at:
.set vector, 0
.rept 32
    .balign 16
    .if !((0x60227d00 >> vector) & 1)
    push 0
    .endif
    push vector
    jmp exception_entry
    .set vector, vector + 1
.endr
.balign 32
interrupts_at:
.set line, 0
.rept 16
    .balign 32
    push rax
    inc dword ptr [interrupts + 4 * line]
    mov eax, 0xfee000b0         /* EOI */
    mov dword ptr [rax], 0
    pop rax
    iretq
    .set line, line + 1
.endr
exception_entry:
    mov rdi, rsp
    mov rsi, cr2
    call exception

.balign 16
.set vector, 0
idt:
.rept 32
    .word exceptions_at - base + 16 * vector, 0x08, 0xee00, BASE >> 16
    .quad 0
    .set vector, vector + 1
.endr
.set line, 0
.rept 16
    .word interrupts_at - base + 32 * line, 0x08, 0xee00, BASE >> 16
    .quad 0
    .set line, line + 1
.endr
idt_end:

.data
.balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .set page, 0
    .rept 12
    .quad directories + page + 7
    .set page, page + 4096
    .endr
    .fill 500, 8, 0
directories:
    .set frame, 0
    .rept 12 * 512
    .quad frame + 0x87          /* 2 MiB, user, writable */
    .set frame, frame + 0x200000
    .endr

.bss
.balign 16
    .skip 16384
stack_top:
    .skip 8192
ring0_stack_top:

.section .note.GNU-stack, "", @progbits
