# SPDX-License-Identifier: Apache-2.0
# A guest that says which tables it finds where x86 has them: A for ACPI's pointer, M for the MP table's, on the serial
# port; then it ends by the exit port or the keyboard controller, whichever there is.
    .code32
    .globl start
start:
    movw $0x3f8, %dx
    movl $0x9fc00, %esi
1:  cmpl $0x20445352, (%esi)        # "RSD PTR "
    jne 2f
    cmpl $0x20525450, 4(%esi)
    jne 2f
    movb $'A', %al
    outb %al, %dx
2:  cmpl $0x5f504d5f, (%esi)        # "_MP_"
    jne 3f
    movb $'M', %al
    outb %al, %dx
3:  addl $16, %esi
    cmpl $0x100000, %esi
    jb 1b
    movb $'\n', %al
    outb %al, %dx
    movb $42, %al
    outb %al, $0xf4
    movb $0xfe, %al
    outb %al, $0x64
4:  hlt
    jmp 4b
