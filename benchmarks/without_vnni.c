/* Preloaded, hides AVX-512, VNNI and AMX from a program: its CPUID instructions trap (Linux, x86-64, processors that can
   fault on CPUID), and are answered without these features. What runs then runs natively, in the kernels for AVX2.

       cc -shared -fPIC -O2 -o without_vnni.so without_vnni.c
       LD_PRELOAD=$PWD/without_vnni.so python ... */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

static void answer(int number, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP];
    if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) { /* not CPUID: a fault of the program's own */
        signal(number, SIG_DFL);
        return;
    }
    unsigned leaf = r[REG_RAX], part = r[REG_RCX], a, b, c, d;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, part, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && part == 0) {
        b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31); /* AVX-512 */
        c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);                                    /* VBMI, VNNI ... */
        d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);               /* AMX, FP16 ... */
    }
    if (leaf == 7 && part == 1)
        a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23), d &= ~(1u << 4 | 1u << 5 | 1u << 10); /* AVX-VNNI, BF16, AMX */
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void)
{
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, 0);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        static const char text[] = "without_vnni: this processor does not fault on CPUID\n";
        (void)!write(2, text, sizeof text - 1);
        _exit(1);
    }
}
