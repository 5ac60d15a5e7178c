"""What the tables say, in the languages of the pages."""

from __future__ import annotations

from .contestants import CONTESTANTS

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "machine": "Measured on",
        "cores": "cores",
        "threads": "threads",
        "rates": "The machine itself reaches {flops:.3g} TFLOP/s in a matrix product and {bytes:.3g} TB/s in a copy "
        "(bytes read and written).",
        "floor": "One picture of {steps} steps is {tera:.3g} TFLOP, which at that rate takes {seconds:.3g} s: no way "
        "of computing all of its products is faster.",
        "not run": "Not run",
        "contestant": "",
        "at once": "**{batch} in a call**, seconds a picture:",
        "seconds a picture": "median s",
        "seconds": "median s (min–max)",
        "spread": "min–max s",
        "to diffusers": "to Diffusers",
        "processor": "processor s",
        "peak": "peak GiB",
        "reserved": "reserved GiB",
        "starts": "**Starting**, in seconds:",
        "load": "load",
        "first picture": "first picture",
        "cached first": "first picture, kernels cached",
        "start to disk": "program's start to picture on disk",
        "quality": "**Likeness**, in dB of the pictures' own range of values. The weights are random: what leaving work"
        " out costs is on the page of [speed](speed.md).",
        "to reference": "to the plain path in single precision",
        "to plain": "to the plain path in half precision",
        "step alone": "**One step** (a guided UNet call and the sampler):",
        "fresh picture": "**A whole picture**, in a process of its own:",
        "side": "picture",
        "batch": "pictures",
        "step": "ms a step",
        "whole call": "s a call",
        "growth side": "**Growth with the size** (one picture, calls of {steps} steps):",
        "growth batch": "**Growth with the number of pictures** (calls of {steps} steps):",
        "failed": "does not fit",
        "counts": "| | kernels a UNet call | views | MiB over weights | kernels a step | waits a step | uploads a step "
        "| MiB, whole run |",
        "time-by-side": "Seconds a step against pixels",
        "memory-by-side": "Peak memory against pixels",
        "time-by-batch": "Seconds a step against pictures in a call",
        "memory-by-batch": "Peak memory against pictures in a call",
    },
    "ko": {
        "machine": "측정한 기계",
        "cores": "코어",
        "threads": "스레드",
        "rates": "이 기계 자체의 속도는 행렬 곱 {flops:.3g} TFLOP/s, 복사 {bytes:.3g} TB/s(읽고 쓴 바이트)입니다.",
        "floor": "{steps}단계 이미지 한 장은 {tera:.3g} TFLOP이고, 이 속도로 {seconds:.3g}초가 걸립니다. "
        "그 곱을 모두 계산하는 한 이보다 빠를 수 없습니다.",
        "not run": "실행하지 않음",
        "contestant": "",
        "at once": "**한 번에 {batch}장**, 한 장당 초:",
        "seconds a picture": "중앙값(초)",
        "seconds": "중앙값(최소–최대), 초",
        "spread": "최소–최대(초)",
        "to diffusers": "Diffusers 대비",
        "processor": "CPU 초",
        "peak": "최대 GiB",
        "reserved": "확보 GiB",
        "starts": "**시작**, 초:",
        "load": "읽기",
        "first picture": "첫 이미지",
        "cached first": "첫 이미지(커널 캐시 있음)",
        "start to disk": "프로그램 시작부터 디스크의 이미지까지",
        "quality": "**닮은 정도**, 이미지 자신의 값 범위에 대한 dB. 가중치는 무작위이므로, 계산을 덜어 낼 때의 차이는"
        " [속도](speed.md) 페이지를 보세요.",
        "to reference": "빠른 경로 없는 단정밀도와",
        "to plain": "빠른 경로 없는 반정밀도와",
        "step alone": "**단계 하나**(가이던스를 쓴 UNet 호출과 샘플러):",
        "fresh picture": "**이미지 한 장 전체**, 각자 새 프로세스에서:",
        "side": "이미지",
        "batch": "장수",
        "step": "단계당 ms",
        "whole call": "호출당 초",
        "growth side": "**크기에 따른 증가**(한 장, {steps}단계 호출):",
        "growth batch": "**장수에 따른 증가**({steps}단계 호출):",
        "failed": "들어가지 않음",
        "counts": "| | UNet 호출당 커널 | 뷰 | 가중치 위 MiB | 단계당 커널 | 단계당 기다림 | 단계당 올리기 "
        "| 전체 실행의 MiB |",
        "time-by-side": "픽셀 수에 따른 단계당 시간",
        "memory-by-side": "픽셀 수에 따른 최대 메모리",
        "time-by-batch": "한 번에 생성하는 장수에 따른 단계당 시간",
        "memory-by-batch": "한 번에 생성하는 장수에 따른 최대 메모리",
    },
}

LABELS_KO = {
    "diffusers": "Diffusers, 그대로",
    "diffusers-last": "Diffusers, channels-last",
    "diffusers-bf16": "Diffusers, channels-last, bfloat16",
    "diffusers-best": "Diffusers, 컴파일",
    "russet": "Russet, 그대로",
    "russet-plain": "Russet, 빠른 경로 없이",
    "russet-deep": "Russet, deep cache(선택)",
    "russet-bf16": "Russet, bfloat16(선택)",
    "reference": "Russet, 빠른 경로 없이, float32",
}


def label(contestant: str, language: str) -> str:
    return LABELS_KO[contestant] if language == "ko" else CONTESTANTS[contestant].label
